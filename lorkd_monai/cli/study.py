"""The commands `lorkd study` and `lorkd report`: they read the arguments and call."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorkd_monai.checks import as_names, as_path, as_value, default_device
from lorkd_monai.errors import LoRKDError

if TYPE_CHECKING:  # `lorkd --help` answers at once
    from lorkd_monai.data import DataList
    from lorkd_monai.study.plan import PlannedRun

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
        settings: full, few10 (labels of 10 % of the training images), few30, and so on, imbalance (half of the
            tasks keep 50 training images) or imbalance30, separated by commas.
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
        patients_csv: file with the columns image and patient: a patient's images are all in one fold, and the bootstrap
            of the intervals draws patients in place of images.
        patient_regex: or a regular expression that finds the patient in the file name.
        changes: settings of all runs, such as --epochs 20 --ema 0.98.
    """
    from lorkd_monai.study.folds import check_folds, fold_of, folds_of, run_folds
    from lorkd_monai.study.methods import MAIN_METHODS, METHODS, QUICK_METHODS, methods_named
    from lorkd_monai.study.patients import with_patients
    from lorkd_monai.study.plan import plan_runs, run_study
    from lorkd_monai.study.settings import QUICK, default_settings
    from lorkd_monai.study.tables import folds_table, study_tables
    from lorkd_monai.study.transfer import run_transfer, the_decomposition

    place, held_out = as_path(output, "output"), as_names(unseen)
    common = default_settings(kind, spatial_dims)
    common = common.changed(QUICK[kind, spatial_dims] if quick else {})
    common = common.changed(
        {key: _mapping(v, key) if isinstance(v, str) and v[:1] == "{" else v for key, v in changes.items()}
    )
    names = as_names(methods)
    if names is None:
        names = ["lorkd_init"] if held_out else list(QUICK_METHODS if quick else MAIN_METHODS)
    chosen = methods_named(list(METHODS) if names == ["all"] else names, _mapping(variants, "variants"))
    for method in chosen:
        method.settings(common)
    if held_out is not None:
        if not held_out:
            raise LoRKDError("unseen: expected 'all', or names of tasks")
        if folds is not None:
            raise LoRKDError("unseen and folds: expected one of them")
        chosen = [method for method in chosen if method.family == "lorkd"] or chosen
    runs = plan_runs(chosen, as_names(settings) or [], _numbers(seeds)[: 1 if quick else None])
    if held_out:
        the_decomposition(runs)
    numbers = [] if fold is None else list(dict.fromkeys(_numbers(fold, "fold")))
    if folds is not None:
        check_folds(folds, numbers)
        numbers = numbers or list(range(folds))
    elif fold is not None:
        raise LoRKDError("fold is for a cross-validation: give the number of --folds")
    if plan_only:
        if dataset_dir is not None:
            _data(dataset_dir, kind, spatial_dims, folds)
        lines = _transfer_plan(held_out, runs) if held_out else [_planned(run) for run in runs]
        if folds is not None:
            lines = [f"fold {number}: {line}" for number in numbers for line in lines]
        print("\n".join(lines))
        return str(place)
    if dataset_dir is None and not quick:
        raise LoRKDError("dataset_dir: expected the folder of a data list; phantoms are taken with --quick only")
    folder = _phantoms(place / "phantoms", kind, spatial_dims) if dataset_dir is None else dataset_dir
    data, where = _data(folder, kind, spatial_dims, folds), device or default_device()
    table = None if patients_csv is None else as_path(patients_csv, "patients_csv")
    data = with_patients(data, ["test"] if folds is None else ["training", "validation"], table, patient_regex)
    if held_out:
        held_out = data.scored if held_out == ["all"] else held_out
        for part in run_transfer(place, data, common, runs, held_out, where, _say):
            _say("\n" + study_tables(part, common.resamples))
    elif folds is not None:
        of_image = folds_of(data, folds)
        parts = {number: fold_of(data, of_image, folds, number) for number in numbers}
        folders = run_folds(place, parts, common, runs, where, keep_weights, _say)
        _say("\nMeasured on images that neither trained nor chose the epoch.\n")
        _say(folds_table(folders, common.resamples))
    else:
        run_study(place, data, common, runs, where, keep_weights, _say)
        _say("\n" + study_tables(place, common.resamples))
    return str(place)


def _say(line: str) -> None:
    print(line, flush=True)


def _phantoms(folder: Path, kind: str, spatial_dims: int) -> Path:
    from lorkd_monai.data import make_phantoms

    if not (folder / "dataset.json").is_file():
        make_phantoms(folder, kind, spatial_dims, num_images=60)
    return folder


def _data(dataset_dir: Any, kind: str, spatial_dims: int, folds: int | None) -> DataList:
    from lorkd_monai.data import load_data_list

    data = load_data_list(as_path(dataset_dir, "dataset_dir"), kind, spatial_dims)
    if not data.test and folds is None:
        raise LoRKDError(
            f"the data list {data.name!r} has no test images with labels to measure on: give it some in 'test', or "
            "measure by cross-validation (--folds)"
        )
    return data


def _planned(run: PlannedRun) -> str:
    return f"{run.setting} {run.method.name} seed {run.seed}: {run.method.about}"


def _transfer_plan(held_out: list[str], runs: list[PlannedRun]) -> list[str]:
    from lorkd_monai.study.transfer import STARTS

    lines = []
    for task in held_out:
        who = "each task held out in turn" if task == "all" else f"{task} held out"
        for seed, own in groupby(runs, key=lambda run: run.seed):
            lines.append(f"{who}: full teacher and {runs[0].method.name} seed {seed} on the other tasks")
            lines += [f"{who}: {run.setting} {', '.join(STARTS)} seed {seed}" for run in own]
    return lines


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
