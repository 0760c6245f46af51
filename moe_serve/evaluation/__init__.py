"""What pruning cost: quality, memory, speed."""
