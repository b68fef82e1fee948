"""Second moments of the inputs of each expert."""
