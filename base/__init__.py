"""Contracts: what every model, data set, loader and training run has in common."""
