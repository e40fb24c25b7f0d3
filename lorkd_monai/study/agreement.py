"""What the runs of one folder must have in common, so that their metrics can be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorkd_monai.data import DataList
from lorkd_monai.data.identity import differences, digest_of, task_identity
from lorkd_monai.errors import LoRKDError
from lorkd_monai.files import read_json
from lorkd_monai.locks import mark_in_use
from lorkd_monai.study.files import FORMAT, RunFile, write_json
from lorkd_monai.study.methods import Method
from lorkd_monai.study.patients import patient_numbers
from lorkd_monai.study.settings import StudySettings

__all__ = ["agree_on_settings", "check_finished"]


def agree_on_settings(
    folder: Path, data: DataList, common: StudySettings, more: Mapping[str, Any] | None = None
) -> None:
    """Write down what the runs of this folder have in common, or refuse to mix them with others.

    Args:
        folder: of the study.
        data: the data list.
        common: settings of all runs.
        more: what else they must have in common.

    Raises:
        LoRKDError: the folder holds a study of other data or with other settings, or is none.
    """
    path, patients = folder / "study.json", patient_numbers(data)
    now: dict[str, Any] = {
        "format": FORMAT,
        "data": {
            "name": data.name, "kind": data.kind, "spatial_dims": data.spatial_dims, "images": data.counts(),
            "digest": digest_of(data),
            "tasks": {name: task_identity(task, data.spatial_dims) for name, task in data.tasks.items()},
            **({"patients of the test images": _digest(patients)} if patients else {}),
        },
        "settings": common.as_data(),
        **({"more": dict(more)} if more else {}),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with mark_in_use(path):
        if not path.exists():
            write_json(path, now)
            return
    before = read_json(path)
    differing = [
        line
        for part in ("data", "settings", *(["more"] if more else []))
        for line in differences(before.get(part, {}), now[part])
    ]
    if differing:
        raise LoRKDError(
            f"{folder} holds a study with other data or settings: {'; '.join(differing)}. Give them again, or another "
            "folder"
        )


def _digest(patients: Mapping[str, list[int]]) -> str:
    return hashlib.sha256(json.dumps(patients).encode()).hexdigest()[:16]


def check_finished(file: RunFile, method: Method, common: StudySettings) -> None:
    """Refuse a finished run whose method has the same name but is another one now.

    Raises:
        LoRKDError: it was, or its file can't be read.
    """
    kept = file.read()
    expected = {
        "family": method.family,
        "distilled": method.distilled,
        **{f"settings {key}": value for key, value in method.settings(common).as_data().items()},
    }
    found = {
        **{key: kept.get(key) for key in ("family", "distilled")},
        **{f"settings {key}": value for key, value in kept.get("settings", {}).items()},
    }
    # A setting that the file lacks was added to this package later.
    differing = [
        f"{key} was {found[key]!r}, now {value!r}" for key, value in expected.items() if found.get(key, value) != value
    ]
    if differing:
        raise LoRKDError(
            f"{file.json} was made by another {method.name!r}: {'; '.join(differing)}. Give the variant another name, "
            f"or delete {file.json.parent} to do its runs again"
        )
