"""Moving traffic."""
