"""Fake weights in a training loop: put into a model for a step or for one layer, and their gradients brought back."""
