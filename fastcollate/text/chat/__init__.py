"""A record -> turns -> what a tokenizer's own chat template writes of them, and which of it is trained."""
