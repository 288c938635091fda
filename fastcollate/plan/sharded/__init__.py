"""An order whose blocks are shards."""
