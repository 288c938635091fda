"""Batches of pairs."""
