"""The one error that means "you can fix this", and how it is shown."""

from __future__ import annotations

import os
import sys
from types import TracebackType

__all__ = ["LoRKDError", "find_lorkd_error", "first_line", "root_cause", "show_errors_plainly"]


class LoRKDError(ValueError):
    """Something that the user gave does not fit. The message has what was expected, what came, and what to do."""


def find_lorkd_error(error: BaseException | None) -> LoRKDError | None:
    """Return the outermost `LoRKDError` in the chain of causes of ``error``, or None.

    MONAI and ignite wrap what our code raises in errors of their own; the message worth reading is ours.
    A context that was cut off with ``raise … from None`` is not followed.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, LoRKDError):
            return error
        seen.add(id(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 300 characters; its ``repr`` where it has no message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else repr(error)


def root_cause(error: BaseException) -> str:
    """Return one line for an error, about its first cause: MONAI's own messages are tracebacks of many lines.

    Example::

        >>> root_cause(ValueError("no such file\\nmore"))
        'ValueError: no such file'
    """
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else type(error).__name__


def _print_plainly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    ours: object = find_lorkd_error(error) if isinstance(error, Exception) else None
    if ours is None and isinstance(error, OSError) and error.filename is not None:
        ours = f"{error.strerror}: {error.filename}. LORKD_TRACEBACK=1 shows where it came from"
    if ours is None or os.environ.get("LORKD_TRACEBACK"):
        sys.__excepthook__(kind, error, trace)
    else:
        print(f"error: {ours}", file=sys.stderr)


def show_errors_plainly() -> None:
    """Print an uncaught `LoRKDError` as one message ``error: …`` in place of a traceback; the exit code stays 1.

    The same holds for a file that can't be read or written. Other errors keep their traceback; with the environment
    variable ``LORKD_TRACEBACK=1`` all do. The command line and the ``initialize`` section of our bundles call this.
    """
    sys.excepthook = _print_plainly
