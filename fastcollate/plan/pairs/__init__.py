"""Pairs of rows as what a plan orders."""
