"""Amax of each granule of each expert."""
