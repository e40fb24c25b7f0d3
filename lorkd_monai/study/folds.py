"""Cross-validation inside the training and validation images, to choose a recipe before the test images are read."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from lorkd_monai.data import DataList
from lorkd_monai.data.splitting import Row, read_patients, share_patients
from lorkd_monai.errors import LoRKDError
from lorkd_monai.study.plan import PlannedRun, run_study
from lorkd_monai.study.settings import StudySettings

__all__ = ["check_folds", "fold_of", "folds_of", "run_folds"]

_SEED = 0  # one division for all seeds of the runs, so that they can be averaged


def check_folds(folds: int, chosen: Sequence[int] = ()) -> None:
    """Refuse a number of folds that can't be, or the number of one that there is not.

    Raises:
        LoRKDError: it is one of these.
    """
    if type(folds) is not int or folds < 3:
        raise LoRKDError(
            f"folds must be a whole number of at least 3 (to measure on, to validate on, to train on), got {folds!r}"
        )
    for fold in chosen:
        if type(fold) is not int or not 0 <= fold < folds:
            raise LoRKDError(f"fold: expected numbers from 0 to {folds - 1}, got {fold!r}")


def folds_of(
    data: DataList, folds: int, patients_csv: str | os.PathLike | None = None, patient_regex: str | None = None
) -> list[int]:
    """The fold, from 0, of each training and then each validation image; the classes of each task are spread evenly.

    All images of a patient are in one fold, over all tasks. Without a word on patients each image is one by itself.

    Args:
        data: the data list.
        folds: how many, at least 3.
        patients_csv, patient_regex: see `read_patients`; for images in files.

    Raises:
        LoRKDError: too few folds, or patients of images that have no file name.
    """
    check_folds(folds)
    items = [*data.training, *data.validation]
    arrays = [item["task"] for item in items if isinstance(item["image"], np.ndarray)]
    if arrays and (patients_csv is not None or patient_regex is not None):
        raise LoRKDError(f"the images of task {arrays[0]!r} are in an .npz file, which does not say whose they are")
    rows = [
        Row(item["task"], f"image {i}" if isinstance(item["image"], np.ndarray) else item["image"], item["label"])
        for i, item in enumerate(items)
    ]
    groups = [(r.task, int(r.label) if isinstance(r.label, (int, np.integer)) else None) for r in rows]
    return share_patients(groups, read_patients(rows, patients_csv, patient_regex), [1 / folds] * folds, _SEED)


def fold_of(data: DataList, fold_of_image: Sequence[int], folds: int, fold: int) -> DataList:
    """The data list of one fold: its images are the test images, those of the next fold the validation images.

    The test images of ``data`` are left out.

    Raises:
        LoRKDError: there is no such fold.
    """
    check_folds(folds, [fold])
    items = [*data.training, *data.validation]

    def chosen(*numbers: int) -> list[dict]:
        return [item for item, number in zip(items, fold_of_image, strict=True) if number in numbers]

    after = (fold + 1) % folds
    return dataclasses.replace(
        data, name=f"{data.name}, fold {fold} of {folds}", test=chosen(fold), validation=chosen(after),
        training=chosen(*(n for n in range(folds) if n not in (fold, after))),
    )  # fmt: skip


def run_folds(
    folder: str | os.PathLike,
    data: DataList,
    common: StudySettings,
    runs: Sequence[PlannedRun],
    folds: int,
    chosen: Sequence[int] | None = None,
    patients_csv: str | os.PathLike | None = None,
    patient_regex: str | None = None,
    device: str | torch.device = "cpu",
    keep_weights: bool = False,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Do a study in each fold of the training and validation images; what is done already is not done again.

    Args:
        folder: ``fold_<number>`` in it is a study of each fold.
        data: the data list; its test images are not looked at.
        common, runs, device, keep_weights, say: see `run_study`.
        folds: how many.
        chosen: which of them; None: all.
        patients_csv, patient_regex: see `folds_of`.

    Returns:
        The folders of the folds.

    Raises:
        LoRKDError: see `folds_of`, `fold_of` and `run_study`.
    """
    fold_of_image = folds_of(data, folds, patients_csv, patient_regex)
    numbers = list(range(folds) if chosen is None else dict.fromkeys(chosen))
    parts = {number: fold_of(data, fold_of_image, folds, number) for number in numbers}
    return [
        run_study(
            Path(folder) / f"fold_{number}", part, common, runs, device, keep_weights,
            say=lambda line, number=number: say(f"fold {number}: {line}"),
        )
        for number, part in parts.items()
    ]  # fmt: skip
