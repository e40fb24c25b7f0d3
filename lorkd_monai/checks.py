"""Paths and names as a command line gives them: it reads ``2024`` as a number, and ``a,b`` as a tuple."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lorkd_monai.errors import LoRKDError

__all__ = ["as_names", "as_path"]


def as_path(value: Any, name: str) -> Path:
    """The path that an argument gives.

    Raises:
        LoRKDError: it is none.
    """
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        number = f"; write ./{value} for a file or folder of this name" if type(value) in (int, float) else ""
        raise LoRKDError(f"{name}: expected a path, got {value!r}{number}")
    return Path(value)


def as_names(value: Any) -> list[str] | None:
    """The names of "a,b", of several, or of a single one; None for None."""
    if value is None:
        return None
    names = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    return [str(name).strip() for name in names if str(name).strip()]
