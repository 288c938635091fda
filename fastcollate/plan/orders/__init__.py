"""The rows that each epoch takes of a source, and its plan."""
