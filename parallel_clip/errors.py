"""The exceptions that end a command with a message and without a traceback."""


class InputError(Exception):
    """The input is wrong: config, layout, data or checkpoint.

    Raised before any work is lost. The message has the numbers and the way out; rank 0 prints it
    alone, without a traceback, and every rank exits with code 2.
    """


class BadDataError(RuntimeError):
    """Too much of the training data could not be decoded: the run ends with exit code 1."""


class WorkerError(Exception):
    """A process that reads data has ended or is stuck."""


class PeerLostError(RuntimeError):
    """Another rank of the job has failed or cannot be reached; it says itself why."""
