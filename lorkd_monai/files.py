"""Files that are written completely or not at all; reading JSON objects."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorkd_monai.errors import LoRKDError
from lorkd_monai.locks import is_abandoned, mark_in_use

__all__ = ["atomic_file", "read_json", "remove_leftovers"]


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Give a path beside ``path`` to write to; at the end of the block that file replaces ``path``.

    If the block raises, or the process is killed in it, ``path`` is as it was. The folder must exist.

    Example::

        with atomic_file("metrics.json") as temporary:
            temporary.write_text("{}")
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    with mark_in_use(temporary):
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors makes files that their owner alone may read
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def remove_leftovers(path: str | os.PathLike) -> None:
    """Delete the temporary files that killed processes left beside ``path``; those of living processes stay."""
    path = Path(path)
    beside = list(path.parent.iterdir()) if path.parent.is_dir() else []
    # A process that was killed after the move left only the lock of its temporary file.
    found = {file.with_suffix("") if file.name.endswith(".tmp.lock") else file for file in beside}
    for leftover in found:
        ours = leftover.name.startswith(f".{path.name}.") and leftover.name.endswith(".tmp")
        if ours and is_abandoned(leftover):
            leftover.unlink(missing_ok=True)


def read_json(path: str | os.PathLike, advice: str = "", pairs_hook: Any = None) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: of the file.
        advice: what to do about a bad one; the end of the message.
        pairs_hook: ``object_pairs_hook`` of `json.loads`.

    Raises:
        LoRKDError: it is missing or no JSON object.
    """
    advice = advice and f"; {advice}"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=pairs_hook)
    except (OSError, ValueError) as error:
        raise LoRKDError(f"{path} can't be read as JSON: {error}{advice}") from error
    if not isinstance(content, dict):
        raise LoRKDError(f"{path} must hold a JSON object, got a {type(content).__name__}{advice}")
    return content
