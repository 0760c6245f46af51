"""The pilot: several prunings measured, and what a decision about them needs, on one page."""
