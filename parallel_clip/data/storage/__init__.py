"""The bytes of shards: files and addresses, tar headers, samples."""
