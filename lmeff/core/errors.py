"""Errors a user can cause. Each one is one paragraph (where, got, expected, remedy) and one exit code of the CLI."""

from typing import Any


class UserError(Exception):
    """Something the user can mend. `exit_code` is what the command line returns for it.

    Not a `ValueError`: a parser of command lines takes those for wrong words, and this error would lose its class and its exit code.
    """

    exit_code = 1


class UsageError(UserError):
    """A command line that cannot be understood."""

    exit_code = 2


class ConfigError(UserError):
    """A config that is wrong or does not fit the devices."""

    exit_code = 3


class MissingExtra(ConfigError):
    """An optional package that this config needs is not installed."""


class DataError(UserError):
    """Text or token files that are missing, damaged or do not fit the config."""

    exit_code = 4


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or does not fit the config."""

    exit_code = 5


class DoesNotFit(UserError):
    """A plan that needs more memory than a device has. `answer`: what was found all the same, for `--json`."""

    exit_code = 6

    def __init__(self, message: str, answer: dict[str, Any] | None = None) -> None:
        """`message`: which device and which category of its memory are to blame."""
        super().__init__(message)
        self.answer = answer or {}


class Preempted(UserError):
    """Told to stop, by SIGTERM or a preemption notice. Nothing is lost: the same command goes on."""

    exit_code = 42
