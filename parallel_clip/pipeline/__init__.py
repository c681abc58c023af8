"""Which layers run on which stage, and in what order microbatches pass through them."""
