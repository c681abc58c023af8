"""The training loop: one step, the optimizer, the run folder's metrics."""
