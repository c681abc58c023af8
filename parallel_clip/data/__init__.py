"""From shards to batches: the order, the index, decoding, transforms, tokens and the loader."""
