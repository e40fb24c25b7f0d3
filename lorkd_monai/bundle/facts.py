"""What an expert's page says of where it comes from: facts on the decomposition, and what its teacher costs."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorkd_monai.bundle.formats import measure
from lorkd_monai.files import atomic_file, read_json
from lorkd_monai.teachers.bundle import bundle_network

__all__ = ["read_facts", "resolved_facts", "teacher_facts", "write_facts"]

_log = logging.getLogger(__name__)


def teacher_facts(
    folder: str | os.PathLike | None, spatial_dims: int, image_size: int | Sequence[int]
) -> dict[str, Any]:
    """The teacher's name, and what one of its passes costs on an image of the student's size, see `measure`.

    A teacher that cannot be run by itself, such as one that takes prompts, has its name only.

    Args:
        folder: the teacher's bundle; None: there was none.
        spatial_dims: 2 or 3.
        image_size: of the student's images or windows, in voxels.
    """
    if folder is None:
        return {"name": "none"}
    facts: dict[str, Any] = {"name": Path(folder).name}
    size = [image_size] * spatial_dims if isinstance(image_size, int) else list(image_size)
    try:
        network, channels = bundle_network(folder)
        costs = measure(network, (1, channels or 1, *size), repeats=3)
    except Exception as error:  # a network may raise anything; the page says "not given" then
        _log.warning("the teacher %s could not be measured: %s", folder, str(error).strip().split("\n")[0])
        return facts
    return {"name": facts["name"], "network": type(network).__name__, **costs}


def resolved_facts(parent: Mapping[str, Any] | None) -> dict[str, Any]:
    """``parent`` with each function without arguments replaced by what it returns."""
    return {key: value() if callable(value) else value for key, value in (parent or {}).items()}


def write_facts(checkpoint: str | os.PathLike, facts: Mapping[str, Any]) -> Path:
    """Write facts.json beside a checkpoint, for exports of it to come; return its path."""
    path = Path(checkpoint).with_name("facts.json")
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read_facts(checkpoint: str | os.PathLike) -> dict[str, Any]:
    """The facts that stand beside a checkpoint; empty where there are none.

    Raises:
        LoRKDError: facts.json is there and holds no facts.
    """
    path = Path(checkpoint).with_name("facts.json")
    return read_json(path, "delete it to go on without the facts") if path.is_file() else {}
