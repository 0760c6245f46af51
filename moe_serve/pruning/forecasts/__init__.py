"""What a run will take, and which size a GPU holds."""
