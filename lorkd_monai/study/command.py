"""What `lorkd study` does with its arguments."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorkd_monai.data import DataList, load_data_list, make_phantoms
from lorkd_monai.errors import LoRKDError
from lorkd_monai.study.folds import check_folds, run_folds
from lorkd_monai.study.methods import METHODS, methods_named
from lorkd_monai.study.plan import PlannedRun, plan_runs, run_study
from lorkd_monai.study.settings import default_settings
from lorkd_monai.study.tables import folds_table, study_tables
from lorkd_monai.study.transfer import STARTS, run_transfer

__all__ = ["MAIN_METHODS", "QUICK_METHODS", "run_from_arguments"]

MAIN_METHODS = (
    "teacher", "stl", "mtl", "stl_kd_init", "mtl_kd_init", "mtl_kd_init_norms", "lorkd_init", "lorkd_init_norms",
)  # fmt: skip
QUICK_METHODS = ("teacher", "stl", "mtl", "stl_kd", "mtl_kd", "lorkd", "lorkd_init_norms")
_QUICK = {
    ("classification", 2): {"epochs": 3, "teacher_epochs": 6, "images_per_epoch": 256},
    ("classification", 3): {"epochs": 3, "teacher_epochs": 6, "images_per_epoch": 384},
    ("segmentation", 2): {"epochs": 6, "teacher_epochs": 12, "images_per_epoch": 64, "image_size": 64},
    ("segmentation", 3): {"epochs": 3, "teacher_epochs": 6, "images_per_epoch": 24, "image_size": (32, 32, 32)},
}


def _say(line: str) -> None:
    print(line, flush=True)


def run_from_arguments(
    output: str | os.PathLike,
    dataset_dir: str | os.PathLike | None,
    kind: str,
    spatial_dims: int,
    methods: Sequence[str] | None,
    settings: Sequence[str],
    seeds: Sequence[int],
    variants: Mapping[str, Mapping[str, Any]] | None,
    changes: Mapping[str, Any],
    quick: bool,
    device: str,
    keep_weights: bool,
    plan_only: bool,
    unseen: Sequence[str] | None = None,
    folds: int | None = None,
    fold: Sequence[int] | None = None,
    patients_csv: str | os.PathLike | None = None,
    patient_regex: str | None = None,
    say: Callable[[str], None] = _say,
) -> Path:
    """Run a study; see `lorkd study --help` for the arguments.

    Raises:
        LoRKDError: an argument that does not fit; see `run_study`.
    """
    common = default_settings(kind, spatial_dims)
    if quick:
        common = common.changed(_QUICK[kind, spatial_dims])
        seeds = list(seeds)[:1]
    common = common.changed(changes)
    if methods is None:
        methods = ["lorkd_init"] if unseen else QUICK_METHODS if quick else MAIN_METHODS
    names = list(METHODS) if list(methods) == ["all"] else methods
    chosen = methods_named(names, variants)
    for method in chosen:
        method.settings(common)
    runs = plan_runs(chosen, settings, seeds)
    if unseen is not None and not unseen:
        raise LoRKDError("unseen: expected 'all', or names of tasks")
    experts = [method for method in chosen if method.family == "lorkd"]
    if unseen and len(experts) != 1:
        raise LoRKDError(f"unseen: expected one decomposition among the methods, got {len(experts)}")
    if folds is None and any(value is not None for value in (fold, patients_csv, patient_regex)):
        raise LoRKDError("fold, patients_csv and patient_regex are for a cross-validation: give the number of --folds")
    if folds is not None:
        check_folds(folds, fold or ())
    if folds is not None and unseen:
        raise LoRKDError("unseen and folds: expected one of them")
    if plan_only:
        if dataset_dir is not None:
            _load(dataset_dir, kind, spatial_dims, folds)
        if folds is not None and fold is None:
            fold = range(folds)
        for number in [None] if folds is None else fold:
            for line in _transfer_plan(unseen, experts[0].name, settings, seeds) if unseen else map(_planned, runs):
                say(line if number is None else f"fold {number}: {line}")
        return Path(output)
    if dataset_dir is None:
        if not quick:
            raise LoRKDError("dataset_dir: expected the folder of a data list; phantoms are taken with --quick only")
        dataset_dir = Path(output) / "phantoms"
        if not (dataset_dir / "dataset.json").is_file():
            make_phantoms(dataset_dir, kind, spatial_dims, num_images=60)
    data = _load(dataset_dir, kind, spatial_dims, folds)
    if unseen:
        held_out = data.scored if list(unseen) == ["all"] else unseen
        for folder in run_transfer(output, data, common, experts[0], held_out, settings, seeds, device, say):
            say("\n" + study_tables(folder, common.resamples))
        return Path(output)
    if folds is not None:
        folders = run_folds(
            output, data, common, runs, folds, fold, patients_csv, patient_regex, device, keep_weights, say
        )
        say(
            "\nMeasured on images that neither trained nor chose the epoch.\n\n"
            + folds_table(folders, common.resamples)
        )
        return Path(output)
    folder = run_study(output, data, common, runs, device, keep_weights, say)
    say("")
    say(study_tables(folder, common.resamples))
    return folder


def _load(dataset_dir: str | os.PathLike, kind: str, spatial_dims: int, folds: int | None) -> DataList:
    data = load_data_list(dataset_dir, kind, spatial_dims)
    if not data.test and folds is None:
        raise LoRKDError(
            f"the data list {data.name!r} has no test images with labels to measure on: give it some in 'test', or "
            "measure by cross-validation (--folds)"
        )
    return data


def _planned(run: PlannedRun) -> str:
    return f"{run.setting} {run.method.name} seed {run.seed}: {run.method.about}"


def _transfer_plan(
    unseen: Sequence[str], decomposition: str, settings: Sequence[str], seeds: Sequence[int]
) -> Iterator[str]:
    for task in unseen:
        who = "each task held out in turn" if task == "all" else f"{task} held out"
        for seed in seeds:
            yield f"{who}: full teacher and {decomposition} seed {seed} on the other tasks"
            for setting in settings:
                yield f"{who}: {setting} {', '.join(STARTS)} seed {seed}"
