"""Quality at equal expert bytes."""
