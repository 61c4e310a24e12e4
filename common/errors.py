"""Errors as one line at the end of a run."""

from __future__ import annotations

import sys
from types import TracebackType

PACKAGES = ("common", "scripts")
"""What this package is called: in the repository, and in a bundle."""

RAISED = (ValueError, OSError, FloatingPointError)
"""What this package raises on purpose, subclasses included."""


def report_in_one_line() -> None:
    """From now on an error that this package raises ends the program with its message alone.

    MONAI wraps what a component or a transform raises into errors of its own, so that the message that names the remedy
    would stand in the middle of a long traceback. Errors of other origin, which may be bugs, keep their traceback.
    """
    sys.excepthook = _print_error


def refusal(error: BaseException) -> BaseException | None:
    """The error that this package raised on purpose and others wrapped into this one; None where there is none."""
    cause: BaseException | None = error
    while cause is not None and not _is_ours(cause):
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return cause


def _print_error(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    cause = refusal(error)
    if cause is None:
        sys.__excepthook__(kind, error, traceback)
    else:
        print(f"error: {cause}", file=sys.stderr)


def _is_ours(error: BaseException) -> bool:
    """Whether the error was raised on purpose: of a kind that this package raises, by a line of it."""
    if not isinstance(error, RAISED):
        return False
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    # By name and not by place, because a bundle has a copy of this package, and MONAI Label serves several.
    return traceback is not None and traceback.tb_frame.f_globals["__name__"].partition(".")[0] in PACKAGES
