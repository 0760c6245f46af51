"""Checkpoints on disk: reading any size safely, writing whole or not at all."""
