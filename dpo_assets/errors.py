"""Errors that a user can act on. Each says what is wrong, where, and the way out."""

from __future__ import annotations


class DpoAssetsError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(DpoAssetsError):
    """The recipe, or what it points at, cannot work. Trying again changes nothing, so it is not retried."""


class FeedbackError(ConfigError):
    """No usable feedback could be read."""


class NoFile(FeedbackError):
    """A source names no file: of a day that may be sound."""


class InfrastructureError(DpoAssetsError):
    """Something outside the recipe failed: a worker was killed, the Hub did not answer. Worth another try."""


class OutOfMemory(DpoAssetsError):
    """A worker stage asked for more memory than its device has.

    A fresh process with smaller forwards may manage; the same one again would not, so it is not retried as it was.
    """


class DiskFull(DpoAssetsError):
    """There is too little room on a disk. Another try would find as little, so it is not retried."""


class Preempted(InfrastructureError):
    """A worker stage was told to end (SIGTERM), and kept what it had done."""


class StageSilent(InfrastructureError):
    """A worker stage showed no sign of progress for longer than it may. One that hangs again will not stop hanging."""


class StageTimeout(DpoAssetsError):
    """A worker stage ran longer than it may. Another try would take as long, so it is not retried."""


class CorruptArtifact(DpoAssetsError):
    """A directory whose manifest is missing or does not match its files."""


class GateError(DpoAssetsError):
    """A check stopped a running stage. `check` names it; `value`, `band` and `fix` go to the check's page.

    Raised by the worker, carried over the process boundary as JSON, shown by the asset as a failed check.
    """

    def __init__(self, check: str, message: str, *, value: float | str, band: str, source: str, fix: str) -> None:
        super().__init__(message)
        self.check, self.value, self.band, self.source, self.fix = check, value, band, source, fix
