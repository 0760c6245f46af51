"""Prune Mixture-of-Experts models, serve the result in vLLM, and roll it out safely."""

__version__ = "0.1.0"
