"""What an expert's page says of where it comes from: facts on the decomposition, and what its teacher costs."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import monai
import torch

from lorkd_monai import __version__
from lorkd_monai.data import DataList
from lorkd_monai.errors import first_line
from lorkd_monai.files import atomic_file, read_json
from lorkd_monai.metrics.costs import measure
from lorkd_monai.networks import LoRKDNet
from lorkd_monai.tasks import image_sides
from lorkd_monai.teachers.bundle import bundle_network

__all__ = ["read_facts", "resolved_facts", "run_facts", "teacher_facts", "write_facts"]

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
    try:
        network, channels = bundle_network(folder)
        costs = measure(network, (1, channels or 1, *image_sides(image_size, spatial_dims)), repeats=3)
    except Exception as error:  # a network may raise anything; the page says "not given" then
        _log.warning("the teacher %s could not be measured: %s", folder, first_line(error))
        return facts
    return {"name": facts["name"], "network": type(network).__name__, **costs}


def resolved_facts(parent: Mapping[str, Any] | None) -> dict[str, Any]:
    """``parent`` with each function without arguments replaced by what it returns."""
    return {key: value() if callable(value) else value for key, value in (parent or {}).items()}


def write_facts(checkpoint: str | os.PathLike, facts: Mapping[str, Any]) -> Path:
    """Write facts.json next to a checkpoint, for exports of it to come; return its path."""
    path = Path(checkpoint).with_name("facts.json")
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read_facts(checkpoint: str | os.PathLike) -> dict[str, Any]:
    """The facts that are next to a checkpoint; empty where there are none.

    Raises:
        LoRKDError: facts.json is there and holds no facts.
    """
    path = Path(checkpoint).with_name("facts.json")
    return read_json(path, "delete it to go on without the facts") if path.is_file() else {}


def run_facts(
    network: LoRKDNet,
    data: DataList,
    teacher_bundle: str | os.PathLike | None,
    max_epochs: int,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Facts on a decomposition for the READMEs of its experts.

    ``teacher`` is a function: what the teacher costs is measured when the experts are written, see `resolved_facts`.
    """
    spec, info = network.spec(), network.info
    counts = {split: len(data.split(split)) for split in ("training", "validation", "test")}
    return {
        "data": f"{data.name}: "
        + ", ".join(f"{n} {split} images" for split, n in counts.items())
        + (f" ({data.unlabelled} training images without a label)" if data.unlabelled else ""),
        "tasks": ", ".join(f"{name} ({n} classes)" for name, n in network.num_classes.items()),
        "experts": f"rank {_words(spec['rank'])}, layout {spec['layout']}, norm {spec['norm']}",
        "epochs": max_epochs,
        "settings": ", ".join(f"{key} {_words(value)}" for key, value in settings.items()),
        "augmentation": {key: settings[key] for key in ("rotate", "flip_axes") if key in settings},
        "teacher": functools.partial(teacher_facts, teacher_bundle, info["spatial_dims"], info["image_size"]),
        "versions": f"lorkd-monai {__version__}, monai {monai.__version__}, torch {torch.__version__}",
    }


def _words(value: Any) -> str:
    """A setting as a person writes it: no brackets, and one number where all are the same."""
    if isinstance(value, Mapping):
        values = list(value.values())
        if values and all(v == values[0] for v in values):
            return _words(values[0])
        return " and ".join(f"{_words(v)} ({k})" for k, v in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return " ".join(map(_words, value)) or "none"
    return str(value)
