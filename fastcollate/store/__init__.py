"""The token store: shards and manifest, written atomically, opened by memory map."""
