"""The whole product once, on a small trained model: prune, serve, compare, roll out, roll back."""
