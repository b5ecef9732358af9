"""User-facing errors, each with the exit code of the command.

A message says what is wrong and where, and how to fix it. `cli.py` prints it without a traceback.
"""


class MegashearError(Exception):
    """Base of all errors that are the user's to solve; `exit_code` is the status of the process."""

    exit_code = 1


class ConfigError(MegashearError):
    """Unknown or mistyped keys, an impossible target, layout or schedule. Holds all problems of a config at once."""

    exit_code = 2

    def __init__(self, problems: str | list[str]) -> None:
        """problems: one message, or several that are printed one a line."""
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(MegashearError):
    """A shard, a dataset, a manifest or a tokenizer that cannot be used as it is."""

    exit_code = 3


class ModelError(MegashearError):
    """A folder of weights that is missing, unsafe, incomplete or of another shape than it says."""

    exit_code = 4


class CheckpointError(MegashearError):
    """No valid checkpoint, one that belongs to another run, or one that cannot be loaded in this layout."""

    exit_code = 5


class TrainingError(MegashearError):
    """Training cannot go on: a loss or gradient that stays non-finite, a domain that ran out under `stop`."""

    exit_code = 6


class StorageError(MegashearError):
    """The file system refused a write: full, read-only, or not permitted. What was there before is still there."""

    exit_code = 7


class BusyError(MegashearError):
    """Another live process holds the run folder."""

    exit_code = 8


class PeerError(MegashearError):
    """Another rank of the job ended, or did not answer in time; the cause is what that rank said."""

    exit_code = 9


class Interrupted(MegashearError):
    """Stopped by a signal after saving a checkpoint; the same command goes on from there (sysexits' EX_TEMPFAIL)."""

    exit_code = 75
