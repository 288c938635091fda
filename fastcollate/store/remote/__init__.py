"""Stores in object storage: the objects of one, on any file system that `fsspec` knows."""
