"""The exceptions that end a command with a message and without a traceback."""


class InputError(Exception):
    """The input is wrong: config, layout, data or checkpoint.

    Raised before any work is lost. The message has the numbers and the way out; rank 0 prints it
    alone, without a traceback, and every rank exits with code 2.
    """


class BadDataError(RuntimeError):
    """Too much of the training data could not be decoded: the run ends with exit code 1."""


class BadStepsError(FloatingPointError):
    """A loss or a gradient is not finite, and `bad_steps` does not allow it: exit code 1."""


class SaveFailedError(RuntimeError):
    """A checkpoint, or shards, could not be written; what was there before is as it was. Exit code
    1."""


class LeaseLostError(SaveFailedError):
    """Another job has taken the run folder over; this one may write nothing more."""


class WorkerError(Exception):
    """A process that reads data has ended or is stuck."""


class PeerLostError(RuntimeError):
    """Another rank of the job has failed or cannot be reached; it says itself why."""
