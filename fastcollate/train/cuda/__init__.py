"""What only a CUDA device has: variable-length attention in one call, the loss in one pass."""
