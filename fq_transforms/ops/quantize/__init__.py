"""Weights to fake weights, and gradients back: to the nearest or stochastic; pass-through, clip and LSQ."""
