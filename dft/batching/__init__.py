"""Rows to batches, and the attention that keeps documents of one batch apart."""
