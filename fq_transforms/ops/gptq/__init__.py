"""Rounding of weights one column after the other, each making up for those before it."""
