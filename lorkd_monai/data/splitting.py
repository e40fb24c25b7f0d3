"""Splitting images into training, validation and test so that no patient is in two of them."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorkd_monai.checks import check_whole
from lorkd_monai.data.form import SPLITS
from lorkd_monai.errors import LoRKDError

__all__ = ["Row", "assign_splits", "read_patients", "share_patients"]


@dataclass
class Row:
    """One image of a data list that is being built: absolute paths, its split and its patient where they are known."""

    task: str
    image: str | list[str]
    label: Any
    split: str | None = None
    patient: str | None = None

    @property
    def first_image(self) -> str:
        """The path of the image, of its first channel where it has several files."""
        return self.image if isinstance(self.image, str) else self.image[0]


def read_patients(
    rows: Sequence[Row], patients_csv: str | os.PathLike | None = None, patient_regex: str | None = None
) -> list[str]:
    """Return each row's patient: from a CSV file, from its file name, or else its own or the image itself.

    Args:
        rows: the images.
        patients_csv: file with the columns ``image`` and ``patient``; an image is a path relative to the file's
            folder, or a bare file name where that is of one patient only.
        patient_regex: searched in the file name; its first group, or all that it matches, is the patient.

    Raises:
        LoRKDError: where both are given, or an image has no patient.
    """
    if patients_csv is not None and patient_regex is not None:
        raise LoRKDError("give patients as a CSV file or as a regular expression of the file name, not both.")
    images = [row.first_image for row in rows]
    if patients_csv is not None:
        find = _patients_of_csv(Path(patients_csv))
        missing = [image for image in images if find(image) is None]
        if missing:
            raise LoRKDError(f"{patients_csv} names no patient for {len(missing)} images, such as {missing[0]}.")
        return [f"patient {find(image)}" for image in images]
    if patient_regex is None:
        # Images with a split keep it. Sub-folders of one name in two splits may belong to two persons.
        return [
            f"patient {row.patient}" if row.patient and not row.split else image
            for row, image in zip(rows, images, strict=True)
        ]
    try:
        pattern = re.compile(patient_regex)
    except (re.error, TypeError) as error:
        raise LoRKDError(f"the patient pattern {patient_regex!r} is no regular expression: {error}") from error
    found = []
    for image in images:
        match = pattern.search(os.path.basename(image))
        patient = match and (match[1] if pattern.groups else match[0])
        if not patient:
            raise LoRKDError(f"the patient pattern {patient_regex!r} finds nothing in the file name of {image}.")
        found.append(f"patient {patient}")
    return found


def assign_splits(
    rows: Sequence[Row], patients: Sequence[str], fractions: Sequence[float] = (0.7, 0.1, 0.2), seed: int = 0
) -> None:
    """Set the split of the rows without one, by whole patients and over all tasks together.

    Each patient, in random order but those with most images first, goes to the split that lacks the largest part of
    its share of the patient's tasks and classes, so that a split is not left empty where there are enough patients.
    A patient who is in a split already stays there.

    Args:
        rows: the images; their ``split`` is set in place.
        patients: the patient of each row.
        fractions: of training, validation and test; they add up to 1.
        seed: of the order.

    Raises:
        LoRKDError: for fractions that do not fit, or a patient whose images are in two splits already.
    """
    numbers = isinstance(fractions, Sequence) and all(type(share) in (int, float) for share in fractions)
    if not numbers or len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6 or fractions[0] == 0:
        raise LoRKDError(
            f"fractions must be three shares (training, validation, test) that add up to 1, got {fractions}."
        )
    check_whole("seed", seed, 0)
    kept: dict[str, set[str]] = {}
    for row, patient in zip(rows, patients, strict=True):
        if row.split is not None:
            kept.setdefault(patient, set()).add(row.split)
    for patient, splits in kept.items():
        if len(splits) > 1:
            raise LoRKDError(f"{patient} is in {' and '.join(sorted(splits))} of the splits that were there.")
    stays = {patient: SPLITS.index(splits.pop()) for patient, splits in kept.items()}
    groups = [(row.task, row.label if isinstance(row.label, int) else None) for row in rows]
    for row, part in zip(rows, share_patients(groups, patients, fractions, seed, stays), strict=True):
        row.split = SPLITS[part]


def share_patients(
    groups: Sequence[Hashable],
    patients: Sequence[str],
    fractions: Sequence[float],
    seed: int,
    stays: Mapping[str, int] | None = None,
) -> list[int]:
    """Return the number of the part of each image; all images of a patient are in one part.

    Each patient, in random order but those with most images first, goes to the part that lacks the largest part of its
    share of the patient's groups.

    Args:
        groups: of each image: what each part is to have its share of, such as a class of a task.
        patients: of each image.
        fractions: of the parts; they add up to 1.
        seed: of the order.
        stays: patients whose part is known.
    """
    stays = stays or {}
    members: dict[str, list[int]] = {}
    for i, patient in enumerate(patients):
        members.setdefault(patient, []).append(i)
    totals = Counter(groups)
    missing = {key: np.array(fractions) * count for key, count in totals.items()}
    names = sorted(members)
    order = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    order.sort(key=lambda patient: (patient not in stays, -len(members[patient])))
    parts = [0] * len(groups)
    for patient in order:
        own = members[patient]
        part = stays.get(patient)
        if part is None:
            lack: Any = sum(missing[groups[i]] / totals[groups[i]] for i in own)
            part = int(np.argmax([p / share if share else -np.inf for p, share in zip(lack, fractions, strict=True)]))
        for i in own:
            parts[i] = part
            missing[groups[i]][part] -= 1
    return parts


def _patients_of_csv(file: Path) -> Any:
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            table = list(csv.DictReader(lines))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LoRKDError(f"cannot read the patients of {file}: {error}") from error
    if not table or not {"image", "patient"} <= set(table[0]):
        raise LoRKDError(f"{file} must have the columns 'image' and 'patient' and a line for each image.")
    by_path: dict[str, str] = {}
    by_name: dict[str, str | None] = {}
    for line in table:
        image, patient = (line["image"] or "").strip(), (line["patient"] or "").strip()
        if not image or not patient:
            raise LoRKDError(f"{file} has a line without an image or a patient: {line}")
        path, name = os.path.realpath(file.parent / image), os.path.basename(image)
        if by_path.setdefault(path, patient) != patient:
            raise LoRKDError(f"{file} names two patients for {image}: {by_path[path]} and {patient}.")
        by_name[name] = patient if by_name.get(name, patient) == patient else None
    return lambda image: by_path.get(os.path.realpath(image)) or by_name.get(os.path.basename(image))
