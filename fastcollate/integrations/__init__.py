"""Adapters to other people's training loops, one file each; none is imported unless it is used."""
