"""Weights to codes and scales, and back."""
