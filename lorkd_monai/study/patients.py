"""Whose the images of a study are: a patient's images stay in one fold, and are drawn together by the bootstrap."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lorkd_monai.data import DataList
from lorkd_monai.data.splitting import Row, read_patients
from lorkd_monai.errors import LoRKDError

__all__ = ["patients_of", "with_patients"]


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
    """The patient of each item; one without a patient is one by itself."""
    return [item.get("patient", f"image {i}") for i, item in enumerate(items)]
