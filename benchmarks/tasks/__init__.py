"""A small pack of lm-eval tasks from texts in this repository."""
