"""Settings of the whole suite."""

from hypothesis import settings

# The same examples on every run, and no verdict that hangs on the speed of the machine.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")
