"""Read data files into conversations."""
