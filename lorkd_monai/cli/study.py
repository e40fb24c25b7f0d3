"""The commands `lorkd study` and `lorkd report`: they read the arguments and call."""

from __future__ import annotations

from typing import Any

from lorkd_monai.checks import as_names, as_path, as_value, default_device
from lorkd_monai.errors import LoRKDError

__all__ = ["report", "study"]


def study(
    output: str,
    dataset_dir: str | None = None,
    kind: str = "classification",
    spatial_dims: int = 2,
    methods: Any = None,
    settings: Any = "full,few10",
    seeds: Any = (0, 1, 2),
    variants: Any = None,
    quick: bool = False,
    device: str | None = None,
    keep_weights: bool = False,
    plan_only: bool = False,
    unseen: Any = None,
    folds: int | None = None,
    fold: Any = None,
    patients_csv: str | None = None,
    patient_regex: str | None = None,
    **changes: Any,
) -> str:
    """Compare the foundation model, single-task and multi-task students and decompositions, under one budget.

    A study that was stopped goes on; runs that are finished are not done again. See docs/study.md.

    Args:
        output: folder of the study.
        dataset_dir: data list with training, validation and test images: a folder with dataset.json, or a file of any
            name; phantoms by default, with --quick.
        kind: classification or segmentation.
        spatial_dims: 2 or 3.
        methods: names separated by commas, or all; the main ones by default.
        settings: full, few10 (labels of 10 % of the training images), few30, and so on, separated by commas.
        seeds: whole numbers separated by commas.
        variants: "{name: {base: lorkd, temperature: 2}}": further methods.
        quick: a short budget and one seed, to see that it works.
        device: such as cuda:0; the first GPU where there is one.
        keep_weights: keep the weights of every run, not of the teachers alone.
        plan_only: list the runs and do none.
        unseen: hold out these tasks ("all", or names separated by commas), one after the other, and train on each from
            a student, an expert and the teacher of the others, in place of the comparison. The one decomposition
            among the methods gives the experts, lorkd_init by default.
        folds: cross-validation: divide the training and validation images into so many folds, and do the study in each
            of them (OUTPUT/fold_0, …): measured on the fold, validated on the next one, trained on the others. The
            test images take no part.
        fold: numbers of the folds to do, separated by commas; all by default.
        patients_csv: file with the columns image and patient; a patient's images are all in one fold.
        patient_regex: or a regular expression that finds the patient in the file name.
        changes: settings of all runs, such as --epochs 20 --ema 0.98.
    """
    from lorkd_monai.study.command import run_from_arguments

    folder = run_from_arguments(
        as_path(output, "output"),
        None if dataset_dir is None else as_path(dataset_dir, "dataset_dir"),
        kind,
        spatial_dims,
        as_names(methods),
        as_names(settings) or [],
        _numbers(seeds),
        _mapping(variants, "variants"),
        {name: _mapping(value, name) if isinstance(value, str) and value[:1] == "{" else value
         for name, value in changes.items()},
        quick,
        device or default_device(),
        keep_weights,
        plan_only,
        as_names(unseen),
        folds,
        None if fold is None else _numbers(fold, "fold"),
        None if patients_csv is None else as_path(patients_csv, "patients_csv"),
        patient_regex,
    )  # fmt: skip
    return str(folder)


def report(folder: str, output: str | None = None) -> str:
    """Write a report of a study or of a training bundle's output: report.html, report.md, and the figures as PNG.

    Needs the extra "report": pip install 'lorkd-monai[report]'.

    Args:
        folder: of lorkd study, or the output_dir of a training bundle.
        output: folder to write to; "report" in the first by default.
    """
    from lorkd_monai.report import write_report

    target = None if output is None else as_path(output, "output")
    return str(write_report(as_path(folder, "folder"), target))


def _numbers(value: Any, name: str = "seeds") -> list[int]:
    words = as_names(value) or []
    if not all(word.isascii() and word.isdigit() for word in words):
        raise LoRKDError(f"{name}: expected whole numbers separated by commas, got {value!r}")
    return [int(word) for word in words]


def _mapping(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    found = as_value(value)
    if not isinstance(found, dict):
        raise LoRKDError(f"{name}: expected '{{name: value, other: value}}', got {value!r}")
    return found
