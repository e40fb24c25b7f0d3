"""Whose the images of a study are: a patient's images stay in one fold, and are drawn together by the bootstrap."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lorkd_monai.data import DataList
from lorkd_monai.data.splitting import Row, read_patients
from lorkd_monai.errors import LoRKDError
from lorkd_monai.metrics.bootstrap import Clusters

__all__ = ["clusters_of", "patient_numbers", "patients_of", "with_patients"]


def with_patients(
    data: DataList,
    splits: Sequence[str],
    patients_csv: str | os.PathLike | None = None,
    patient_regex: str | None = None,
) -> DataList:
    """The data list with the patient of each image of some splits, ``item["patient"]``.

    Args:
        data: the data list.
        splits: such as ``["test"]``; their images are in files.
        patients_csv, patient_regex: see `read_patients`; without both of them the list stays as it is.

    Raises:
        LoRKDError: images that have no file name, or no patient.
    """
    if patients_csv is None and patient_regex is None:
        return data
    named = {}
    for split in splits:
        items = data.split(split)
        arrays = [item["task"] for item in items if isinstance(item["image"], np.ndarray)]
        if arrays:
            raise LoRKDError(f"the images of task {arrays[0]!r} are in an .npz file, which does not say whose they are")
        rows = [Row(item["task"], item["image"], item["label"]) for item in items]
        patients = read_patients(rows, patients_csv, patient_regex)
        named[split] = [{**item, "patient": patient} for item, patient in zip(items, patients, strict=True)]
    return dataclasses.replace(data, **named)


def patients_of(items: Sequence[Mapping[str, Any]]) -> list[str]:
    """The patient of each item; an image without one is a patient by itself, by the name of its file."""

    def by_itself(i: int, image: Any) -> str:
        if isinstance(image, np.ndarray):
            return f"image {i}"
        return str(image[0] if isinstance(image, list) else image)

    return [item.get("patient") or by_itself(i, item["image"]) for i, item in enumerate(items)]


def patient_numbers(data: DataList) -> dict[str, list[int]]:
    """Task -> a number for the patient of each of its test images; nothing where the list knows no patients.

    Numbers in place of names: a run's file goes where the names of patients may not.
    """
    if not any("patient" in item for item in data.test):
        return {}
    numbers: dict[str, int] = {}
    found: dict[str, list[int]] = {}
    for item, patient in zip(data.test, patients_of(data.test), strict=True):
        found.setdefault(item["task"], []).append(numbers.setdefault(patient, len(numbers)))
    return found


def clusters_of(patients: Mapping[str, Sequence[int]]) -> dict[str, Clusters]:
    """What the bootstrap draws in each task: the patients of all the tasks that share some with it, directly or not.

    Args:
        patients: as `patient_numbers` gives them.

    Example::

        >>> one = clusters_of({"a": [0, 0, 1], "b": [1, 2], "c": [3]})
        >>> one["a"].count, one["b"].of_image.tolist(), one["c"].count
        (3, [1, 2], 1)
    """
    groups: list[list[str]] = []
    for name, own in patients.items():
        sharing = [group for group in groups if any(set(own) & set(patients[other]) for other in group)]
        groups = [group for group in groups if group not in sharing] + [[*sum(sharing, []), name]]
    clusters = {}
    for group in groups:
        places = {patient: i for i, patient in enumerate(dict.fromkeys(p for name in group for p in patients[name]))}
        most, first = max(len(patients[name]) for name in group), min(map(list(patients).index, group))
        for name in group:
            of_image = torch.tensor([places[patient] for patient in patients[name]])
            clusters[name] = Clusters(of_image, len(places), most, first)
    return clusters
