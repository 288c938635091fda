"""Weights that move from step to step: how many rows of each source a step has."""
