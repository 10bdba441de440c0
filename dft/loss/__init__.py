"""Hidden states to the loss."""
