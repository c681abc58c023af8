"""How many samples each shard has and where they lie."""
