"""The two ways in which a command ends because of what it was given."""


class InputError(Exception):
    """The input is wrong: config, layout, data or checkpoint.

    Raised before any work is lost. The message has the numbers and the way out; rank 0 prints it
    alone, without a traceback, and every rank exits with code 2.
    """


class BadDataError(RuntimeError):
    """Too much of the training data could not be decoded: the run ends with exit code 1."""


class WorkerError(Exception):
    """A process that reads data has ended or is stuck."""
