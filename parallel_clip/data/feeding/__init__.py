"""From the order of samples to batches: data sets, loader and workers."""
