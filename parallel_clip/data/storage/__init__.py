"""Read shards: local and remote files, tar headers, samples."""
