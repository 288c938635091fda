"""Learning from pairs: direct preference optimization."""
