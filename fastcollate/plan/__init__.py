"""Which rows make which batch: order, packing, mixing, splits."""
