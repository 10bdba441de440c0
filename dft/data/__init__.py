"""Many rows to a dataset and its report."""
