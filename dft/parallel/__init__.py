"""Several processes and nodes: what they must have in common, and how they reach each other."""
