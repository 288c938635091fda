"""Record -> texts -> token ids: templates and tokenizers."""
