"""The order of the samples of a run: a pure function of seed and position. No torch."""
