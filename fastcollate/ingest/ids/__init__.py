"""Records that hold ids already -> rows: which of their columns are taken, and what these say is trained."""
