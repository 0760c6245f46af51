"""Deciding what to keep, and building it: plan, then apply."""
