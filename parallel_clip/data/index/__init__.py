"""The index of shards: how many samples each has, and where in the file each sample is."""
