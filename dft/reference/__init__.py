"""What the weights that a training begins with say of its tokens."""
