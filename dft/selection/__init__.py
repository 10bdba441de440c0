"""Select training rows: clean files, drop near-duplicates and contaminated rows, and say what was dropped and why."""
