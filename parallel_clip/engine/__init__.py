"""Device, launch environment and process groups of a process."""
