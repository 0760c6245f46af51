"""The page of the control process."""
