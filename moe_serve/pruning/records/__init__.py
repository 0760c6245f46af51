"""What goes with a checkpoint: evidence, card, the record of its texts, and their checks."""
