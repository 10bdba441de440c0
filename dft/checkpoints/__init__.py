"""Checkpoints: which one a run is resumed from."""
