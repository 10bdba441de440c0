"""Rows to batches, and the attention that keeps the documents of a batch apart."""
