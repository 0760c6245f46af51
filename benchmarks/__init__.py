"""Figures for the README and the documentation, each by a command."""
