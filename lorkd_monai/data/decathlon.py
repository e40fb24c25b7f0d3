"""Medical Segmentation Decathlon and nnU-Net folders as one multi-task data list."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorkd_monai.data.builders import Sources, task_folders
from lorkd_monai.data.form import SPLITS
from lorkd_monai.data.splitting import Row, assign_splits, read_patients
from lorkd_monai.data.writing import Skipped, new_list
from lorkd_monai.errors import LoRKDError
from lorkd_monai.files import read_json

__all__ = ["from_segmentation_folders"]

_log = logging.getLogger(__name__)


def from_segmentation_folders(
    sources: Sources,
    output: str | os.PathLike,
    spatial_dims: int = 3,
    fractions: Sequence[float] = (0.7, 0.1, 0.2),
    seed: int = 0,
    patients_csv: str | None = None,
    patient_regex: str | None = None,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a segmentation list from folders of the Medical Segmentation Decathlon or of nnU-Net, one task each.

    Both have ``imagesTr``, ``labelsTr`` and a ``dataset.json``. A Decathlon folder lists its cases there; in an
    nnU-Net folder (version 1 or 2) each mask of ``labelsTr`` is a case, whose images carry the suffixes ``_0000``,
    ``_0001``, … (several are the channels of one image). Masks in ``labelsTs`` make a test split, which is kept, as
    is a ``validation`` that the Decathlon form lists; the other images are split.

    Args:
        sources: one folder, a list of them, or ``{task: folder}``. ``Task09_Spleen`` becomes ``spleen``.
        output: the folder for ``dataset.json``.
        spatial_dims: 2 or 3.
        fractions: of training, validation and test.
        seed: of the split.
        patients_csv: see `lorkd_monai.data.splitting.read_patients`.
        patient_regex: see there.
        facts: more about a task, as ``{task: {"spacing": [1, 1, 2]}}``.
        overwrite: replace an existing list.

    Raises:
        LoRKDError: for a folder of another form, labels that are regions, or what `load_data_list` refuses.

    Example::

        from_segmentation_folders(["Task04_Hippocampus", "Dataset009_Spleen"], "my_list")
    """
    with new_list(output, "segmentation", spatial_dims, overwrite) as new:
        for task, folder in task_folders(sources).items():
            content = _read(folder)
            new.tasks[task] = _entry(content, folder)
            # Version 1 of nnU-Net has the Decathlon's dataset.json: the channel numbers of its files tell them apart.
            is_nnunet = "channel_names" in content or any(folder.glob("imagesTr/*_0000.*"))
            found = (_nnunet_rows if is_nnunet else _decathlon_rows)(task, folder, content, new.skipped)
            if not any(row.label for row in found):
                raise LoRKDError(f"{folder} has no image with a mask.")
            said, there = content.get("numTraining"), sum(row.split in (None, "training") for row in found)
            if isinstance(said, int) and said != there:
                _log.warning("task %r: dataset.json says numTraining %d, and there are %d.", task, said, there)
            new.rows += found
        assign_splits(new.rows, read_patients(new.rows, patients_csv, patient_regex), fractions, seed)
        return new.write(facts)


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "dataset.json"
    content = read_json(file, "a folder of the Decathlon or of nnU-Net has a dataset.json")
    if not isinstance(content.get("labels"), dict):
        raise LoRKDError(f"{file} must be an object with 'labels', as the Decathlon and nnU-Net write it.")
    return content


def _entry(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    labels = content["labels"]
    if all(isinstance(key, str) and key.isdigit() for key in labels):
        pairs = [(int(key), value) for key, value in labels.items()]  # {"0": "background"}
    else:
        pairs = [(value, key) for key, value in labels.items()]  # {"background": 0}, of nnU-Net version 2
        if any(isinstance(number, list) for number, _ in pairs):
            raise LoRKDError(f"{folder}: labels that are regions (lists of numbers) overlap, which is not supported.")
        if "ignore" in labels:
            raise LoRKDError(
                f"{folder}: an 'ignore' label is not supported; give these voxels a class, or leave it out."
            )
        try:
            pairs = [(int(number), name) for number, name in pairs]
        except (TypeError, ValueError) as error:
            raise LoRKDError(f"{folder}: labels must be {{name: number}} or {{number: name}}, got {labels}.") from error
    entry: dict[str, Any] = {"labels": {str(number): name for number, name in sorted(pairs)}}
    channels = content.get("channel_names") or content.get("modality")
    if isinstance(channels, dict) and channels:
        names = [str(name).strip() for name in channels.values()]
        entry["modality"] = ", ".join(dict.fromkeys("MR" if n.upper().startswith("MR") else n for n in names))
        entry["channels"] = len(names)
    licence = content.get("licence", content.get("license"))
    return entry | ({"licence": licence} if isinstance(licence, str) and licence.strip() else {})


def _decathlon_rows(task: str, folder: Path, content: dict[str, Any], skipped: Skipped) -> list[Row]:
    rows = []
    listed_files = set()
    for split in SPLITS:
        listed = content.get(split, [])
        for item in listed if isinstance(listed, list) else []:
            if isinstance(item, str) and split == "test":
                skipped.add("test images without masks: nothing can be measured on them", folder / item)
                listed_files.add(os.path.normpath(folder / item))
                continue
            whole = isinstance(item, dict) and isinstance(item.get("image"), str) and "label" in item
            if not whole or not isinstance(item["label"], (str, type(None))):
                raise LoRKDError(f"{folder}: expected {{'image': …, 'label': …}} in {split!r}, got {str(item)[:100]}.")
            image, label = (item[key] and os.path.normpath(folder / item[key]) for key in ("image", "label"))
            listed_files |= {image, label}
            # Without a mask an image can be of use in training only.
            rows.append(Row(task, image, label, None if split == "training" and label else split))
    for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        for path in _files_of(folder / part, skipped):
            if os.path.normpath(path) not in listed_files:
                skipped.add("files that dataset.json does not list", path)
    return rows


def _nnunet_rows(task: str, folder: Path, content: dict[str, Any], skipped: Skipped) -> list[Row]:
    rows = []
    named = content.get("channel_names") or content.get("modality") or {}
    for part, split in (("Tr", None), ("Ts", "test")):
        images, masks = folder / f"images{part}", folder / f"labels{part}"
        if part == "Tr" and not (images.is_dir() and masks.is_dir()):
            raise LoRKDError(f"{folder} must have the folders imagesTr and labelsTr.")
        ending = content.get("file_ending") or _common_ending(masks if masks.is_dir() else images)
        channels: dict[str, dict[int, str]] = {}
        for path in _files_of(images, skipped):
            match = re.fullmatch(rf"(.+)_(\d{{4}}){re.escape(ending)}", path.name, re.IGNORECASE)
            if match:
                channels.setdefault(match[1], {})[int(match[2])] = str(path)
            else:
                skipped.add(
                    f"files of images{part} without a channel number and {ending}, as in case_0000{ending}", path
                )
        cases = set()
        for mask in _files_of(masks, skipped):
            if not mask.name.lower().endswith(ending.lower()):
                skipped.add(f"files of labels{part} whose names do not end in {ending}", mask)
                continue
            case = mask.name[: -len(ending)]
            cases.add(case)
            if case not in channels:
                raise LoRKDError(f"the mask {mask} has no image {images / case}_0000{ending}.")
            files = _in_order(channels[case], len(named), images / case, ending)
            rows.append(Row(task, files[0] if len(files) == 1 else files, str(mask), split))
        for case in sorted(channels.keys() - cases):
            skipped.add(f"images of images{part} without a mask", images / case)
    counts = {1 if isinstance(row.image, str) else len(row.image) for row in rows}
    if len(counts) > 1:
        raise LoRKDError(f"{folder}: cases have {sorted(counts)} channel files, dataset.json names {len(named)}.")
    return rows


def _in_order(files: dict[int, str], expected: int, case: Path, ending: str) -> list[str]:
    """The channel files of a case by their numbers, which must be 0, 1, … without a gap."""
    count = expected or max(files) + 1
    missing = [number for number in range(count) if number not in files]
    if missing:
        raise LoRKDError(
            f"the channel file {case}_{missing[0]:04d}{ending} is missing: the case has the channels "
            f"{', '.join(f'{number:04d}' for number in sorted(files))}"
            + (f", dataset.json names {expected}." if expected else ".")
        )
    if len(files) > count:
        raise LoRKDError(
            f"{files[max(files)]}: cases have [{len(files)}] channel files, dataset.json names {expected}."
        )
    return [files[number] for number in range(count)]


def _files_of(folder: Path, skipped: Skipped) -> list[Path]:
    """The files of a folder by name, without hidden ones; none where there is no such folder."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name[0] == ".":
            skipped.add("hidden files and folders", path)
        elif path.is_dir():
            skipped.add("folders among the images", path)
        else:
            found.append(path)
    return found


def _common_ending(folder: Path) -> str:
    names = [path.name.lower() for path in folder.iterdir() if path.name[0] != "."] if folder.is_dir() else []
    return next(
        (e for e in (".nii.gz", ".nii", ".png", ".nrrd", ".mha", ".tif") if any(n.endswith(e) for n in names)), ""
    )
