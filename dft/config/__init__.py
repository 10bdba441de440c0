"""Command-line flags, their types and their errors."""
