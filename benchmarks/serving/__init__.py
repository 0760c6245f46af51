"""The engine with compact checkpoints."""
