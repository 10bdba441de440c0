"""A conversation to token ids and labels."""
