"""Checkpoints: whole or absent, verified, resumed."""
