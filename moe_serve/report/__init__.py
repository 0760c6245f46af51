"""The report: one self-contained page on what was pruned and why."""
