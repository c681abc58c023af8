"""`parallel-clip data check` and `pack`."""
