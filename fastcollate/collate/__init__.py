"""Rows -> batches in one kernel call, and the plain reference beside it."""
