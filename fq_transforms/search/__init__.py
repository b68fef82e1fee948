"""A format for each part of a model under a budget of bytes: the search, sensitivities, and the knapsack solver."""

from fq_transforms.search.search import Mixture, Option, Unit, search

__all__ = ["Mixture", "Option", "Unit", "search"]
