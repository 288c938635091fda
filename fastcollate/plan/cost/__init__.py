"""What batches cost, and how they are dealt so that all ranks finish together."""
