"""Which sample stands at which position of a run. No torch."""
