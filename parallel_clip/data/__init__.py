"""From shards to batches. A folder imports only those before it in this list: storage, index,
order, samples, feeding, tools."""
