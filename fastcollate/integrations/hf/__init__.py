"""What `fastcollate.integrations.huggingface` offers: the collator, what a `Trainer` takes, loss by source."""
