"""What identifies a data list, whatever its name: its tasks, its splits, and the files of its images."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorkd_monai.data.datalist import DataList
from lorkd_monai.data.form import SPLITS
from lorkd_monai.tasks import TaskSpec
from lorkd_monai.transforms import default_intensity

__all__ = ["data_identity", "differences", "digest_of", "file_stamps", "split_digests", "task_identity"]

# What precedes the name of the data file in a header file.
_DATA_FILE = {".mhd": r"ElementDataFile\s*=", ".nhdr": r"data ?file:"}
_HEADER_BYTES = 2**16


def digest_of(data: DataList) -> str:
    """A digest of which images are in which split, in their order, with their labels, and of the classes.

    An image file counts by its path within the data list's folder: a copy of the folder is the same data.
    """
    digest = hashlib.sha256()
    for name, task in data.tasks.items():
        digest.update(f"{name} {task.labels}\n".encode())
    for split in SPLITS:
        _add_split(digest, data, split)
    return digest.hexdigest()[:16]


def split_digests(data: DataList) -> dict[str, str]:
    """A digest of the images and labels of each split, as in `digest_of` but without the names of classes."""
    digests = {split: hashlib.sha256() for split in SPLITS}
    for split, digest in digests.items():
        _add_split(digest, data, split)
    return {split: digest.hexdigest()[:16] for split, digest in digests.items()}


def _add_split(digest: Any, data: DataList, split: str) -> None:
    def add(value: Any) -> None:
        if isinstance(value, np.ndarray):
            digest.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, (list, tuple)):
            for one in value:
                add(one)
        elif isinstance(value, (str, os.PathLike)):
            path = Path(value)
            inside = path.is_relative_to(data.folder)
            digest.update(f"{path.relative_to(data.folder).as_posix() if inside else path}\n".encode())
        else:
            digest.update(f"{value if value is None else int(value)}\n".encode())

    for item in data.split(split):
        digest.update(f"{split} {item['task']}\n".encode())
        add(item["image"])
        add(item["label"])


def task_identity(task: TaskSpec, spatial_dims: int) -> dict[str, Any]:
    """What a network's weights assume of a task, as plain data: its classes in their order, and what its images are."""
    return {
        "classes": list(task.labels.values()),
        "channels": task.channels,
        "intensity": default_intensity(task, spatial_dims),
        "spacing": None if task.spacing is None else list(task.spacing),
    }


def data_identity(data: DataList) -> dict[str, Any]:
    """What must be the same for a training to go on, as plain data: the tasks in their order, and the splits.

    Example::

        >>> data = load_data_list("data", "segmentation", 3)
        >>> differences(data_identity(data), {**data_identity(data), "tasks": ["ct", "mr"]})
        ["tasks was ['ct', 'ultrasound', 'mr'], now ['ct', 'mr']"]
    """
    return {
        "tasks": list(data.tasks),
        **{f"task {name!r}": task_identity(task, data.spatial_dims) for name, task in data.tasks.items()},
        **{f"digest of the {split} images and labels": digest for split, digest in split_digests(data).items()},
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two descriptions, in words; a value that one of them lacks is None.

    A description in ``now`` that ``before`` lacks counts as the same: it was not recorded then.
    """
    found = []
    for key in {**before, **now}:
        one, other = _plain(before.get(key)), _plain(now.get(key))
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += [f"{key}: {line}" for line in differences(one, other)]
        elif one != other and not (key not in before and isinstance(other, Mapping)):
            found.append(f"{key} was {before.get(key)!r}, now {now.get(key)!r}")
    return found


def _plain(value: Any) -> Any:
    """With lists for tuples: a file gives lists back."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def file_stamps(value: Any) -> list[list[Any]]:
    """Name, size and times of every file that an image or a mask is read from; they change where its content does.

    Args:
        value: a path, several of them (one for each channel), or something else, which has no files. A folder means
            all of its files, and a header (.mhd, .nhdr, .hdr, .img) its data too.
    """
    files = sorted({file for path in _paths(value) for file in _files_of(path)})
    return [[str(file), (s := file.stat()).st_size, s.st_mtime_ns, s.st_ctime_ns] for file in files]


def _paths(value: Any) -> Iterator[Path]:
    if isinstance(value, (str, os.PathLike)):
        yield Path(value)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _paths(one)


def _files_of(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from (file for file in path.rglob("*") if file.is_file())
        return
    yield path
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".hdr", ".img")):
        stem = path.name[: name.rindex(".")]
        yield from (file for file in path.parent.glob(f"{glob.escape(stem)}.*") if file.is_file())
    elif path.suffix.lower() in _DATA_FILE:
        with path.open("rb") as file:
            header = file.read(_HEADER_BYTES).decode("latin-1")
        named = re.search(rf"(?im)^{_DATA_FILE[path.suffix.lower()]}\s*(.+?)\s*$", header)
        if named and (path.parent / named[1]).is_file():
            yield path.parent / named[1]
        elif named and named[1].upper() != "LOCAL":  # a list or a pattern of files: any of its folder's
            yield from (file for file in path.parent.iterdir() if file.is_file())
