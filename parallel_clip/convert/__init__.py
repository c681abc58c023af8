"""Our parameters and other people's checkpoints, in both directions."""
