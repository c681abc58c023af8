"""The commands `data check` and `data pack`."""
