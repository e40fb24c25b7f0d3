"""Cross-validation inside the training and validation images, to choose a recipe before the test images are read."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from lorkd_monai.data import DataList
from lorkd_monai.data.splitting import share_patients
from lorkd_monai.errors import LoRKDError
from lorkd_monai.study.patients import patients_of
from lorkd_monai.study.plan import PlannedRun, run_study
from lorkd_monai.study.settings import StudySettings

__all__ = ["check_folds", "fold_of", "folds_of", "run_folds"]

_SEED = 0  # one division for all seeds of the runs, so that they can be averaged


def check_folds(folds: int, chosen: Sequence[int] = ()) -> None:
    """Refuse fewer than three folds, and a number of a fold that does not exist.

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


def folds_of(data: DataList, folds: int) -> list[int]:
    """The fold, from 0, of each training and then each validation image; the classes of each task are spread evenly.

    All images of a patient are in one fold, over all tasks. An image without a patient (see `with_patients`) is one by
    itself.

    Raises:
        LoRKDError: too few folds.
    """
    check_folds(folds)
    items = [*data.training, *data.validation]
    labels = [item["label"] if isinstance(item["label"], (int, np.integer)) else None for item in items]
    groups = [(item["task"], label if label is None else int(label)) for item, label in zip(items, labels, strict=True)]
    return share_patients(groups, patients_of(items), [1 / folds] * folds, _SEED)


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
    parts: Mapping[int, DataList],
    common: StudySettings,
    runs: Sequence[PlannedRun],
    device: str | torch.device = "cpu",
    keep_weights: bool = False,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Do a study in each fold of the training and validation images; what is done already is not done again.

    Args:
        folder: ``fold_<number>`` in it is a study of each fold.
        parts: number of a fold -> its data list, see `fold_of`.
        common, runs, device, keep_weights, say: see `run_study`.

    Returns:
        The folders of the folds.

    Raises:
        LoRKDError: see `run_study`.
    """
    return [
        run_study(
            Path(folder) / f"fold_{number}", part, common, runs, device, keep_weights,
            say=lambda line, number=number: say(f"fold {number}: {line}"),
        )
        for number, part in parts.items()
    ]  # fmt: skip
