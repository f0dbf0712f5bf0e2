"""Errors a user can cause or meet: each class carries the exit code of its kind."""

from __future__ import annotations


class TpllmError(Exception):
    """One clear sentence for the user; `exit_code` is what the process ends with."""

    exit_code = 1


class UsageError(TpllmError):
    """The command line asks for something that cannot be."""

    exit_code = 2


class PreflightError(TpllmError):
    """The machine lacks what the work needs: space, a compiler, a launcher, a device."""

    exit_code = 10


class MismatchError(TpllmError):
    """An engine or checkpoint does not fit this launch."""

    exit_code = 11


class DataError(TpllmError):
    """Input data is missing, torn or not what it says it is."""

    exit_code = 12


class RankError(TpllmError):
    """A rank failed for a reason that is not the user's."""

    exit_code = 20


class TimeOutError(TpllmError):
    """Something took longer than its bound."""

    exit_code = 21


class OutOfMemory(TpllmError):
    """A rank ran out of memory."""

    exit_code = 22


class InterruptedRun(TpllmError):
    """The run was stopped from outside and can be resumed."""

    exit_code = 75
