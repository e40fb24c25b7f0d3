"""Checks of arguments that several parts share: numbers, paths and names.

A command line reads ``2024`` as a number, and ``a,b`` as a tuple.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

from lorkd_monai.errors import LoRKDError

__all__ = [
    "TASK_NAME",
    "as_names",
    "as_path",
    "as_value",
    "check_whole",
    "default_device",
    "is_bundle_name",
    "is_file_name",
    "is_real",
    "is_whole",
]

TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""The name of a task in a data list. Decompositions that were not made from one may have others."""


def as_path(value: Any, name: str) -> Path:
    """The path that an argument gives.

    Raises:
        LoRKDError: it is no path.
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


def as_value(text: str) -> Any:
    """The value of a text such as ``{a: folder/b}`` or ``[a, b]`` in YAML; None where it is no YAML."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def is_file_name(name: Any) -> bool:
    """True where a task's name can be part of the name of a file: ASCII letters, digits, ``_`` and ``-`` only."""
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None


def is_bundle_name(name: str) -> bool:
    """True for ``<task>_<kind>``, the name of an expert bundle's folder: MONAI Label reads the kind of work from it."""
    return is_file_name(name) and re.fullmatch(".+_(classification|segmentation)", name) is not None


def is_whole(value: Any, least: int = 1) -> bool:
    """True for a whole number of at least ``least``; False for booleans."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_real(value: Any) -> bool:
    """True for a finite number; False for booleans."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """Refuse a value that is no whole number of at least ``least``.

    Raises:
        LoRKDError: it is not; the message begins with ``name``.
    """
    if not is_whole(value, least):
        raise LoRKDError(f"{name} must be a whole number of at least {least}, got {value!r}")


def default_device() -> str:
    """Where networks run unless told otherwise: the first GPU, or else the CPU."""
    import torch  # takes seconds: the other checks need none of it

    return "cuda:0" if torch.cuda.is_available() else "cpu"
