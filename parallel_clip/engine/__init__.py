"""Where a process finds out what it runs on and who it is: device, launch, process groups."""
