"""Zero-shot classification, retrieval and held-out loss of an encoder, on evaluation shards."""
