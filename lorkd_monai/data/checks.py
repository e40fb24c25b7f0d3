"""The checks of a data list. Each notes its problems, so that one message has all of them."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lorkd_monai.checks import TASK_NAME
from lorkd_monai.data.form import ITEM_KEYS, SPLITS, TASK_KEYS, class_ids, faults
from lorkd_monai.errors import LoRKDError
from lorkd_monai.losses.task import UNLABELLED
from lorkd_monai.transforms.loading import ImageFacts, ItemLoader

__all__ = [
    "NPZ_ARRAYS",
    "Problems",
    "check_items",
    "check_masks",
    "check_task_name",
    "check_tasks",
    "read_npz_tasks",
    "read_origin",
]

_log = logging.getLogger(__name__)

_NPZ_NAMES = {"training": "train", "validation": "val", "test": "test"}
NPZ_ARRAYS = {f"{name}_{part}" for name in _NPZ_NAMES.values() for part in ("images", "labels")} | {"class_names"}
_SHOWN = 20


class Problems(list):
    """What is wrong with a data list so far, a line for each problem."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def raise_any(self) -> None:
        """Raise one `LoRKDError` that lists the problems, the first twenty in words; nothing where there are none."""
        count = len(self)
        if not count:
            return
        shown = [f"  * {line}" for line in self[:_SHOWN]]
        if count > _SHOWN:
            shown.append(f"  … and {count - _SHOWN} more")
        raise LoRKDError(f"the data list {self.file} has {count} problem{'s' * (count > 1)}:\n" + "\n".join(shown))


def check_task_name(name: Any) -> str | None:
    """Return what is wrong with a task's name, or None. It becomes a folder's name and part of config ids."""
    if isinstance(name, str) and TASK_NAME.fullmatch(name):
        return None
    return (
        f"task name {name!r} cannot be a folder's name: use 1 to 64 letters a-z, digits, '_' and '-', "
        "a letter or digit first"
    )


def unique_keys(problems: Problems) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """Return a hook for `json.loads` that notes keys that an object has twice; JSON would drop the first."""

    def hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in pairs:
            if key in content:
                problems.append(f"the key {key!r} is twice in one object")
            content[key] = value
        return content

    return hook


def check_tasks(tasks: Any, problems: Problems, origin: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the entries of ``"tasks"`` that can be used, and note what is wrong with them.

    ``origin`` is the list's own licence and authors, for tasks without their own.
    """
    if not isinstance(tasks, dict) or not tasks:
        problems.append('"tasks" must be an object with at least one task, such as {"spleen": {"labels": {…}}}')
        return {}
    entries = {}
    lower: dict[str, str] = {}
    for name, entry in tasks.items():
        fault = check_task_name(name)
        if fault is None and lower.setdefault(name.lower(), name) != name:
            fault = f"tasks {lower[name.lower()]!r} and {name!r} differ by case only, which folders may not"
        if fault is None and not isinstance(entry, dict):
            fault = f"task {name!r} must be an object with 'labels', got {entry!r}"
        problems += [fault] if fault else [f"task {name!r}: {line}" for line in faults(entry, TASK_KEYS)]
        if isinstance(entry, dict):  # kept though faulty, so that its items are not reported as of an unknown task
            labels = entry.get("labels")
            own = {key: value or origin[key] for key, value in read_origin(entry).items()}
            entries[name] = {**entry, **own, "labels": labels if class_ids(labels) else {}}
    return entries


def read_origin(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"licence": text or None, "authors": list of texts or None}`` of a list or of one of its tasks.

    One author may come without a list; ``license`` is read as ``licence``.
    """
    authors = content.get("authors")
    return {
        "licence": content.get("licence", content.get("license")),
        "authors": [authors] if isinstance(authors, str) else authors,
    }


def check_items(
    content: dict[str, Any], split: str, entries: dict[str, dict], folder: Path, kind: str, problems: Problems
) -> list[dict[str, Any]]:
    """Return the items of one split with absolute paths, and note what is wrong with them."""
    rows = content.get(split, [])
    if not isinstance(rows, list):
        problems.append(f"{split!r} must be a list of items, got a {type(rows).__name__}")
        return []
    items = []
    unlabelled: list[str] = []
    for number, row in enumerate(rows):
        where = f"{split}[{number}]"
        if not isinstance(row, dict) or not row.keys() >= ITEM_KEYS.keys():
            problems.append(f"{where} must have 'image', 'label' and 'task', got {str(row)[:200]}")
            continue
        task = row["task"]
        if not isinstance(task, str) or task not in entries:
            problems.append(f"{where}: unknown task {task!r}; the list has {', '.join(entries) or 'none'}")
            continue
        if "npz" in entries[task]:
            problems.append(f"{where}: task {task!r} names an npz file, so its images cannot be listed as well")
            continue
        image = _files(row["image"], folder, where, "image", problems)
        if row["label"] is None or (type(row["label"]) is int and row["label"] == UNLABELLED):
            unlabelled.append(where)
            label = None
        else:
            label = _label(row["label"], entries[task], folder, kind, where, problems)
            image = None if label is None else image
        if image is not None and (label is not None or split == "training"):
            items.append({"image": image, "label": label, "task": task})
    if unlabelled and split != "training":
        _tell_left_out(len(unlabelled), split, unlabelled[0])
    return items


def _tell_left_out(count: int, split: str, where: str) -> None:
    _log.warning(
        f"left out {count} {split} image{'s' * (count > 1)} without a label ({where}{', …' * (count > 1)}): nothing "
        "can be measured on them; in training they learn from the teacher"
    )


def read_npz_tasks(
    entries: dict[str, dict],
    items: dict[str, list[dict[str, Any]]],
    folder: Path,
    kind: str,
    spatial_dims: int,
    problems: Problems,
) -> dict[str, ImageFacts]:
    """Append the images of tasks that name an ``.npz`` file to ``items``; return what is known of them."""
    facts = {}
    for name, entry in entries.items():
        if "npz" not in entry:
            continue
        where = f"task {name!r}"
        if kind == "segmentation":
            problems.append(
                f"{where}: npz files hold classes, not masks; list the images and masks of a segmentation task"
            )
            continue
        file = _files(entry["npz"], folder, where, "npz file", problems)
        if file is None:
            continue
        try:
            with np.load(file, allow_pickle=False) as arrays:
                stored = {key: arrays[key] for key in arrays.files if key.endswith(("_images", "_labels"))}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{where}: {entry['npz']} is no npz file of plain arrays ({error})")
            continue
        for split in SPLITS:
            images: Any = stored.get(f"{_NPZ_NAMES[split]}_images")
            labels: Any = stored.get(f"{_NPZ_NAMES[split]}_labels")
            if images is None and labels is None and split != "training":
                continue
            fault = _npz_fault(images, labels, _NPZ_NAMES[split], spatial_dims, entry)
            if fault:
                problems.append(f"{where}: {entry['npz']}: {fault}")
                continue
            known = [None if label == UNLABELLED else label for label in labels.reshape(-1).tolist()]
            items[split] += [
                {"image": image, "label": label, "task": name}
                for image, label in zip(images, known, strict=True)
                if label is not None or split == "training"
            ]
            if split != "training" and None in known:
                _tell_left_out(known.count(None), split, f"{where}: {entry['npz']}")
            if images.dtype.kind == "f" and not np.isfinite(images).all():
                first = np.argmin(np.isfinite(images).reshape(len(images), -1).all(1))
                problems.append(
                    f"{where}: its arrays hold values that are not finite (NaN or infinity); replace them: "
                    f"{entry['npz']}, {_NPZ_NAMES[split]}_images[{first}]"
                )
            if name not in facts:
                facts[name] = _npz_facts(images, spatial_dims)
                continue
            before, own = facts[name].values, _values(images)
            if before is not None and own is not None:
                facts[name] = replace(facts[name], values=(min(before[0], own[0]), max(before[1], own[1])))
    return facts


def check_masks(items: dict[str, list[dict[str, Any]]], loaders: dict[str, ItemLoader], problems: Problems) -> None:
    """Read every mask and note those that do not fit their task."""
    for rows in items.values():
        for item in rows:
            if item["label"] is None:
                continue
            try:
                loaders[item["task"]](item)
            except LoRKDError as error:
                problems.append(str(error).replace("\n", " "))


def _files(value: Any, folder: Path, where: str, what: str, problems: Problems) -> Any:
    """Return the absolute path (or paths, for a list) of a file that the list names, or None with the problem noted."""
    if isinstance(value, list) and value and what == "image":
        paths = [_files(v, folder, where, "image of one channel", problems) for v in value]
        return None if None in paths else paths
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        problems.append(f"{where}: the {what} must be the path of a file, got {value!r}")
        return None
    path = os.path.join(folder, value)
    if not os.path.exists(path):
        problems.append(f"{where}: missing {what} {value}")
        return None
    return path


def _label(label: Any, entry: dict, folder: Path, kind: str, where: str, problems: Problems) -> Any:
    if kind == "segmentation":
        if isinstance(label, int):
            problems.append(
                f"{where}: the label must be the path of a mask, or null for none, got {label!r}; is this a "
                "classification list?"
            )
            return None
        return _files(label, folder, where, "mask", problems)
    if isinstance(label, bool) or not isinstance(label, int):
        problems.append(f"{where}: the label must be a class id, or null for none, got {label!r}")
        return None
    if entry["labels"] and not 0 <= label < len(entry["labels"]):
        problems.append(f"{where}: label {label} is outside the classes 0 to {len(entry['labels']) - 1} of its task")
        return None
    return label


def _npz_fault(images: Any, labels: Any, name: str, spatial_dims: int, entry: dict[str, Any]) -> str | None:
    for part, array in (("images", images), ("labels", labels)):
        if array is None:
            return f"the array {name}_{part} is missing"
    if images.ndim - 1 - spatial_dims not in (0, 1):
        return f"{name}_images must be N×{'×'.join('HWD'[:spatial_dims])}[×C], got shape {images.shape}"
    if images.dtype.kind not in "uif" or labels.dtype.kind not in "ui":
        return (
            f"expected numbers and whole-number labels, got {images.dtype} in {name}_images and {labels.dtype} labels"
        )
    if labels.ndim > 2 or labels.size != len(images) or len(labels) != len(images):
        return f"expected one class id per image, got {len(images)} images and labels of shape {labels.shape}"
    count = len(entry["labels"])
    if count and labels.size and (labels.min() < UNLABELLED or labels.max() >= count):
        bad = next(v for v in labels.reshape(-1).tolist() if not UNLABELLED <= v < count)
        return f"{name}_labels holds {bad}, outside the classes 0 to {count - 1} ({UNLABELLED}: no label)"
    return None


def _npz_facts(images: np.ndarray, spatial_dims: int) -> ImageFacts:
    """What is known of images without preprocessing; a fourth (or second) channel that is white throughout is alpha."""
    channels = images.shape[-1] if images.ndim == spatial_dims + 2 else 1
    if spatial_dims == 2 and channels in (2, 4) and images.dtype.kind == "u":
        channels -= bool((images[..., -1] == np.iinfo(images.dtype).max).all())
    floats = images.dtype.kind == "f"
    return ImageFacts(spatial_dims, channels, 8 * images.dtype.itemsize, None, _values(images), floats)


def _values(images: np.ndarray) -> tuple[float, float] | None:
    if images.dtype in (np.uint8, np.uint16) or not images.size:
        return None
    return float(images.min()), float(images.max())
