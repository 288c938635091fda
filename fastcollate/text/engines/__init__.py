"""What encodes: tiktoken, tokenizers, gigatoken, and where they agree."""
