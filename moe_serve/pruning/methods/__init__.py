"""Methods: pure functions from a layer's statistics to what it keeps."""
