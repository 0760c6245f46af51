"""Carrying a plan out: blocks built, kept weights and routers re-fitted, layer by layer."""
