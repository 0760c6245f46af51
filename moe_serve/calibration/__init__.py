"""Observing a model: texts, token sequences, the layer-by-layer stream, statistics."""
