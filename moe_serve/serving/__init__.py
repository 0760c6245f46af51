"""Engines, proxy and routes on one machine."""
