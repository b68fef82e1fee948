"""Of several amax, the one with the least squared error."""
