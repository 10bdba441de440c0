"""Sums over tokens to log records."""
