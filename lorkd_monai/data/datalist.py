"""Data lists of many tasks: what they hold, and reading one, with all its problems in one message.

The form is a superset of the Medical Segmentation Decathlon's ``dataset.json``::

    {"name": "…",
     "tasks": {"spleen": {"labels": {"0": "background", "1": "spleen"}, "modality": "CT"},
               "breast": {"labels": {"0": "malignant", "1": "benign"}, "npz": "breastmnist.npz"}},
     "training": [{"image": "a.nii.gz", "label": "a_seg.nii.gz", "task": "spleen"}, …],
     "validation": […], "test": […]}
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorkd_monai.data.checks import (
    Problems,
    check_items,
    check_masks,
    check_tasks,
    read_npz_tasks,
    read_origin,
    unique_keys,
)
from lorkd_monai.data.form import LIST_KEYS, SPLITS, faults
from lorkd_monai.errors import LoRKDError
from lorkd_monai.files import read_json
from lorkd_monai.tasks import TaskSpec, Work, check_kind, image_sides
from lorkd_monai.transforms.loading import ImageFacts, ItemLoader, describe_image
from lorkd_monai.transforms.preprocessing import measured_intensity, preprocessing

__all__ = ["DataList", "counts_table", "load_data_list", "measure_spacing", "remarks"]

_log = logging.getLogger(__name__)

# Notes of tasks whose images are only there to try things out: "for wiring, never for a score", "wiring only".
_NO_SCORE = re.compile(r"wiring only|never (for )?a score|\bno score\b", re.IGNORECASE)
_MEASURED = ("channels", "intensity", "spacing")  # on a task's images, where the list does not state them
_MOST_HEADERS = 50  # images per task whose headers are read for the median spacing


@dataclass(frozen=True)
class DataList:
    """A data list that was read and checked.

    An item of ``training``, ``validation`` and ``test`` is ``{"image": …, "label": …, "task": name}``. An image is an
    absolute path (a list of paths: one file per channel) or an array H×W[×C] or H×W×D[×C]; a label is a class id or
    the path of a mask, or None for a training image that has none. ``licence`` and ``authors`` are those of
    all images; `TaskSpec` has a task's own. ``stated`` names which of channels, intensity and spacing the list gives
    for a task; the others were measured on its images. ``npz`` has the file of each task whose images are arrays.
    """

    name: str
    folder: Path
    kind: str
    spatial_dims: int
    tasks: dict[str, TaskSpec]
    training: list[dict[str, Any]] = field(default_factory=list, repr=False)
    validation: list[dict[str, Any]] = field(default_factory=list, repr=False)
    test: list[dict[str, Any]] = field(default_factory=list, repr=False)
    licence: str | None = None
    authors: list[str] | None = None
    stated: dict[str, list[str]] = field(default_factory=dict, repr=False)
    npz: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def num_classes(self) -> dict[str, int]:
        """Task name to number of classes, in order: what ``LoRKDNet(tasks=…)`` takes."""
        return {name: task.num_classes for name, task in self.tasks.items()}

    @property
    def scored(self) -> list[str]:
        """Names of the tasks whose metrics count."""
        return [name for name, task in self.tasks.items() if task.score]

    def work(self, in_channels: int, image_size: int | Sequence[int]) -> Work:
        """The work of networks that take these images with so many channels, in this size (voxels)."""
        return Work(self.kind, self.spatial_dims, in_channels, image_sides(image_size, self.spatial_dims), self.tasks)

    def only(self, *names: str) -> DataList:
        """The list with some of its tasks, in their order, and their images."""
        kept = [name for name in self.tasks if name in names]
        tasks = {name: dataclasses.replace(self.tasks[name], index=i) for i, name in enumerate(kept)}
        items: dict[str, Any] = {
            split: [item for item in self.split(split) if item["task"] in tasks] for split in SPLITS
        }
        return dataclasses.replace(self, tasks=tasks, **items)

    def split(self, name: str) -> list[dict[str, Any]]:
        """Return the items of ``"training"``, ``"validation"`` or ``"test"``."""
        if name not in SPLITS:
            raise LoRKDError(f"expected a split of {', '.join(SPLITS)}, got {name!r}.")
        return getattr(self, name)

    @property
    def unlabelled(self) -> int:
        """Number of training images without a label; they learn only from the teacher."""
        return sum(item["label"] is None for item in self.training)

    def counts(self) -> dict[str, dict[str, int]]:
        """Return the number of images of each task in each split."""
        found = {split: Counter(item["task"] for item in self.split(split)) for split in SPLITS}
        return {name: {split: found[split][name] for split in SPLITS} for name in self.tasks}


def load_data_list(
    path: str | os.PathLike,
    kind: str,
    spatial_dims: int,
    needs: Sequence[str] = ("training",),
    check_labels: bool = False,
) -> DataList:
    """Read a multi-task data list and check all of it.

    Paths in the list are relative to its folder; absolute paths are taken as they are. The number of channels is
    measured on each task's first image, and for 3D segmentation the spacing is the median of the training images,
    where the list does not state them.

    Checked: the form; names of tasks (they become folder names); files that are missing; tasks that are unknown or
    have no images; labels outside the classes; one image file in two splits. Equal pixels in two splits are no
    problem: published sets contain some.

    Args:
        path: the JSON file, or the folder that holds it as ``dataset.json``.
        kind: ``"classification"`` or ``"segmentation"``.
        spatial_dims: 2 or 3.
        needs: splits that must not be empty.
        check_labels: read every mask too and check its values, which takes a while.

    Raises:
        LoRKDError: once, with every problem (the first twenty written out).

    Example::

        data = load_data_list("data", "segmentation", 3)
        data.num_classes, len(data.training)
    """
    check_kind(kind, spatial_dims)
    file = Path(path)
    file = file / "dataset.json" if file.is_dir() else file
    problems = Problems(file)
    if not file.is_file():
        raise LoRKDError(
            f"no data list at {file}. Expected a dataset.json, or the folder that holds one; 'lorkd data' makes it."
        )
    content = read_json(file, "expected a data list, with 'tasks'", unique_keys(problems))
    folder = file.parent.resolve()
    for key, value in (("kind", kind), ("spatial_dims", spatial_dims)):
        if content.get(key, value) != value:
            problems.append(f"the list is made for {key} {content[key]!r}, and is read for {value!r}")
    problems.raise_any()

    problems += [f"the list: {line}" for line in faults(content, LIST_KEYS)]
    origin = read_origin(content)
    entries = check_tasks(content.get("tasks"), problems, origin)
    items: dict[str, Any] = {split: check_items(content, split, entries, folder, kind, problems) for split in SPLITS}
    facts = read_npz_tasks(entries, items, folder, kind, spatial_dims, problems)
    _check_presence(entries, items, needs, problems)
    _check_leaks(items, problems)
    problems.raise_any()

    facts |= _first_images(entries, items, spatial_dims, problems)
    tasks = {name: _task(name, i, entry, facts[name], spatial_dims) for i, (name, entry) in enumerate(entries.items())}
    if check_labels and kind == "segmentation":
        loaders = {
            name: ItemLoader(
                preprocessing(task, kind, spatial_dims, task.channels or 1, 8, ("image", "label")), spatial_dims
            )
            for name, task in tasks.items()
        }
        check_masks(items, loaders, problems)
    problems.raise_any()
    stated = {name: [k for k in _MEASURED if entry.get(k) is not None] for name, entry in entries.items()}
    name = str(content.get("name", file.parent.name))
    npz = {name: os.path.join(folder, entry["npz"]) for name, entry in entries.items() if "npz" in entry}
    data = DataList(name, folder, kind, spatial_dims, tasks, **items, **origin, stated=stated, npz=npz)
    for line in remarks(data):
        _log.warning("%s", line)
    return measure_spacing(data) if kind == "segmentation" and spatial_dims == 3 else data


def measure_spacing(data: DataList) -> DataList:
    """Return the list with ``spacing`` set where a task has none: the median over its training images, by axis.

    Headers of at most 50 images, spread over the list, are read. Lengths are in mm, axes in the order of RAS.

    Raises:
        LoRKDError: naming an image that cannot be read.
    """
    tasks = dict(data.tasks)
    for name, task in data.tasks.items():
        images = [item["image"] for item in data.training or data.test if item["task"] == name]
        if task.spacing is not None or not images:
            continue
        step = -(-len(images) // _MOST_HEADERS)
        spacings = [describe_image(image).spacing for image in images[::step]]
        if any(spacing is None or len(spacing) != data.spatial_dims for spacing in spacings):
            continue
        median = tuple(round(statistics.median(axis), 4) for axis in zip(*spacings, strict=True))
        tasks[name] = dataclasses.replace(task, spacing=median)
    return dataclasses.replace(data, tasks=tasks)


def _check_presence(entries: dict, items: dict[str, list], needs: Sequence[str], problems: Problems) -> None:
    if entries and not any(items.values()) and not problems:
        problems.append("the list is empty: it names no image in training, validation or test")
        return
    for split in needs:
        if split not in SPLITS:
            raise LoRKDError(f"needs: expected splits of {', '.join(SPLITS)}, got {split!r}.")
        present = {item["task"] for item in items[split]}
        for name in entries:
            if name not in present and not (split == "validation" and present):
                problems.append(f"task {name!r} has no image in {split}")


def _check_leaks(items: dict[str, list], problems: Problems) -> None:
    seen: dict[str, str] = {}
    for split, rows in items.items():
        for item in rows:
            for image in item["image"] if isinstance(item["image"], list) else [item["image"]]:
                if isinstance(image, str):
                    real = os.path.realpath(image)
                    if seen.setdefault(real, split) != split:
                        problems.append(f"the same image is in {seen[real]} and {split}: {image}")
                    seen[real] = split


def _first_images(entries: dict, items: dict[str, list], dims: int, problems: Problems) -> dict[str, ImageFacts]:
    facts = {}
    for name in entries:
        if "npz" in entries[name]:
            continue
        images = [item["image"] for split in SPLITS for item in items[split] if item["task"] == name]
        try:
            found = facts[name] = _common_facts(images)
            if found.spatial_dims != dims:
                problems.append(
                    f"task {name!r}: {images[0]} is a {found.spatial_dims}D image, the list is read as {dims}D"
                )
        except LoRKDError as error:
            problems.append(str(error).replace("\n", " "))
    problems.raise_any()
    return facts


def _common_facts(images: list) -> ImageFacts:
    """Return the first image's facts; where its data type gives no range, with the range of some others as well."""
    facts = describe_image(images[0])
    if facts.values is None:
        return facts
    known = [facts.values] + [describe_image(image).values for image in images[1 :: -(-len(images) // _MOST_HEADERS)]]
    lows, highs = zip(*(values for values in known if values is not None), strict=True)
    return dataclasses.replace(facts, values=(min(lows), max(highs)))


def _task(name: str, index: int, entry: dict[str, Any], facts: ImageFacts, dims: int) -> TaskSpec:
    intensity = entry.get("intensity")
    measured = intensity is None
    if measured and dims == 2:
        intensity = measured_intensity(facts, entry.get("modality"))
    if measured and dims == 3 and "npz" in entry and facts.bits == 8:
        intensity = {"range": [0, 255]}
    spacing, prompts = entry.get("spacing"), entry.get("vista3d_class")
    prompts = {"1": prompts} if isinstance(prompts, int) else prompts
    return TaskSpec(
        name=name,
        index=index,
        labels={int(key): value for key, value in sorted(entry["labels"].items(), key=lambda pair: int(pair[0]))},
        channels=entry.get("channels", facts.channels),
        intensity=intensity,
        spacing=None if spacing is None else tuple(map(float, spacing)),
        vista3d_class=None if prompts is None else {int(key): value for key, value in prompts.items()},
        measured=measured,
        score=entry.get("score", not _NO_SCORE.search(entry.get("note") or "")),
        **{key: entry.get(key) for key in ("modality", "body_part", "note", "licence", "authors")},
    )


def counts_table(data: DataList) -> str:
    """A Markdown table of the images: a row for each class of each task (segmentation: each task), a column a split.

    Images without a label have a row of their own.
    """
    lines = ["| task | class | " + " | ".join(SPLITS) + " |", "|---|---|" + "---|" * len(SPLITS)]
    for task, counts in _label_counts(data).items():
        for label, row in counts.items():
            cells = " | ".join(str(row[split]) for split in SPLITS)
            lines.append(f"| {task} | {label} | {cells} |")
    sums = " | ".join(str(len(data.split(split))) for split in SPLITS)
    return "\n".join([*lines, f"| all | | {sums} |"])


def remarks(data: DataList) -> list[str]:
    """What a user should know of a list that can be used: classes without training images, splits without images."""
    lines = []
    for task, counts in _label_counts(data).items():
        if data.kind == "classification":
            missing = [name for name in data.tasks[task].labels.values() if not counts[name]["training"]]
            if missing and "(no label)" not in counts:  # the teacher may show it the others
                lines.append(
                    f"task {task!r}: no training image of the class{'es' * (len(missing) > 1)} {', '.join(missing)}; "
                    "its expert cannot learn to name what it never saw"
                )
    for split, one, whole in (
        ("validation", "it does not count in the choice of the best epoch", "the weights of the last epoch are kept"),
        ("test", "its expert is written without metrics", "experts are written without metrics"),
    ):
        present = {item["task"] for item in data.split(split)}
        if not present:
            lines.append(f"the list has no {split} images: {whole}")
        else:
            lines += [f"task {task!r} has no {split} images: {one}" for task in data.tasks if task not in present]
    return lines


def _label_counts(data: DataList) -> dict[str, dict[str, dict[str, int]]]:
    """{task: {class: {split: images}}}; one nameless class for segmentation; "(no label)" where there are any."""
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for name, task in data.tasks.items():
        classes = task.labels.values() if data.kind == "classification" else [""]
        counts[name] = {label: dict.fromkeys(SPLITS, 0) for label in classes}
    for split in SPLITS:
        for item in data.split(split):
            own, name = counts[item["task"]], "(no label)"
            if item["label"] is not None:
                name = data.tasks[item["task"]].labels[item["label"]] if data.kind == "classification" else ""
            own.setdefault(name, dict.fromkeys(SPLITS, 0))[split] += 1
    return counts
