"""Batches filled ahead and copied to the device: the loader."""
