"""Locks of the operating system on folders and files: they end with the process that holds them, however it ends.

A lock's file is deleted while the lock is still held. A process that waits for it then finds the file gone, and
`filelock` tries again with a new one. So no process deletes the lock file of another.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lorkd_monai.errors import LoRKDError

__all__ = ["LOCK_FILE", "claim", "claimed", "is_abandoned", "mark_in_use", "release"]

LOCK_FILE = ".in_use.lock"
"""Name of the file in a claimed folder."""

_claims: dict[Path, FileLock] = {}


def claim(folder: str | os.PathLike, advice: str) -> None:
    """Keep other processes out of a folder until it is released or this process ends; the folder is made.

    Claims of one process are counted: each needs its `release`.

    Args:
        folder: what to claim.
        advice: what to do where another process has it; the end of the message.

    Raises:
        LoRKDError: another process has it.
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lock = _claims.get(folder) or FileLock(folder / LOCK_FILE, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise LoRKDError(f"{folder} is in use: another process works in it right now. {advice}") from error
    _claims[folder] = lock


def release(folder: str | os.PathLike | None = None) -> None:
    """Take a claim of this process back; None: all of them."""
    for path in list(_claims) if folder is None else [Path(folder).resolve()]:
        lock = _claims[path]
        if folder is None or lock.lock_counter == 1:
            del _claims[path]
            _remove(path / LOCK_FILE)
        lock.release(force=folder is None)


atexit.register(release)  # the lock ends anyway; its file would stay


@contextmanager
def claimed(folder: str | os.PathLike, advice: str) -> Iterator[None]:
    """A claim for the length of a block, see `claim`."""
    claim(folder, advice)
    try:
        yield
    finally:
        release(folder)


@contextmanager
def mark_in_use(path: Path) -> Iterator[None]:
    """Mark a file or folder as being made by a living process, for a block; wait while another process makes it."""
    with FileLock(_beside(path)):
        try:
            yield
        finally:
            _remove(_beside(path))


def is_abandoned(path: Path) -> bool:
    """Whether the process that made ``path`` under `mark_in_use` has ended."""
    try:
        with FileLock(_beside(path)).acquire(timeout=0):
            _remove(_beside(path))
    except Timeout:
        return False
    return True


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _remove(lock_file: Path) -> None:
    with contextlib.suppress(OSError):  # another process may look at it just now
        lock_file.unlink(missing_ok=True)
