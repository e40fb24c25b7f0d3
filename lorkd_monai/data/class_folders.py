"""Finding the images of class folders: which folders are tasks, classes, splits or patients; which files are images."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from lorkd_monai.data.form import SPLITS
from lorkd_monai.data.splitting import Row
from lorkd_monai.data.writing import Skipped
from lorkd_monai.errors import LoRKDError
from lorkd_monai.locks import LOCK_FILE
from lorkd_monai.transforms.dicom import is_dicom, is_series
from lorkd_monai.transforms.loading import PICTURES, SUFFIXES

__all__ = ["class_images", "holds_tasks", "visible_folders"]

_SPLIT_FOLDERS = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "test": 2, "testing": 2}
_MASK_FOLDERS = {"mask", "masks", "label", "labels", "seg", "segmentation", "segmentations", "annotations"}
_IMAGE_FOLDERS = {"image", "images", "img", "imgs", "data", *_MASK_FOLDERS}
# Folders of these names are classes more often than tasks.
_CLASS_WORDS = {"benign", "malignant", "normal", "abnormal", "healthy", "ill", "sick", "positive", "negative"}


def class_images(task: str, folder: Path, spatial_dims: int, skipped: Skipped) -> list[Row]:
    """Return all images below a task's folder, whose sub-folders are the classes, or splits with the classes in them.

    Their labels are the names of the classes. Images in a sub-folder of a class have its name as their patient. What
    is left out goes to ``skipped``.

    Raises:
        LoRKDError: for classes whose names differ by case only, or split folders beside others.
    """
    found: list[Row] = []
    folders: dict[str, list[Path]] = {}
    for root, split in _splits_in(folder, skipped) or [(folder, None)]:
        _skip_files(root, skipped)
        for place in visible_folders(root, skipped):
            folders.setdefault(place.name, []).append(place)
            parts = [] if split else _splits_in(place, skipped)
            for inner, own in parts or [(place, split)]:
                for path in _images_in(inner, spatial_dims, skipped, {os.path.realpath(inner)}):
                    below = path.relative_to(inner).parts[:-1]
                    found.append(Row(task, str(path), place.name, own, "/".join(below) or None))
    _refuse_twins(folder, folders)
    for name in folders.keys() - {row.label for row in found}:
        for place in folders[name]:
            skipped.add("class folders without an image", place)
    _set_patients(found)
    return found


def holds_tasks(root: Path, inside: Sequence[Path], spatial_dims: int) -> bool:
    """Say whether the folders in a folder are tasks (True) or the classes, or splits, of one task.

    Raises:
        LoRKDError: both can be meant.
    """
    deeper = {path: visible_folders(path) for path in inside}
    names = [sub.name for subs in deeper.values() for sub in subs]
    if not names or all(path.name.lower() in _SPLIT_FOLDERS for path in inside):
        return False
    # A folder that holds images beside its sub-folders is a class: a task holds only folders.
    if any(_images_here(path, spatial_dims) for path in inside) or {n.lower() for n in names} <= _IMAGE_FOLDERS:
        return False
    if {n.lower() for n in names} <= set(_SPLIT_FOLDERS):
        return any(visible_folders(sub) for subs in deeper.values() for sub in subs)
    like_patients = all(any(char.isdigit() for char in name) for name in names)
    if not like_patients and not any(path.name.lower() in _CLASS_WORDS for path in inside):
        return True
    given = [path for path in inside if deeper[path]]
    outer, inner = ", ".join(p.name for p in given[:3]), ", ".join(sub.name for sub in deeper[given[0]][:3])
    tasks = ", ".join(f"{path.name}: {path}" for path in given)
    raise LoRKDError(
        f"{root} can be read in two ways: {outer} may be tasks with the classes {inner}, …, or classes whose images "
        f"are in sub-folders, one for each patient. For one task of the classes {outer} give '[{root}]'; for tasks "
        f"give '{{{tasks}}}'."
    )


def visible_folders(folder: Path, skipped: Skipped | None = None) -> list[Path]:
    """Return the sub-folders, by name, that may be tasks or classes: not those that begin with "." or "_".

    Raises:
        LoRKDError: it is no folder, or cannot be read.
    """
    if not folder.is_dir():
        raise LoRKDError(f"expected a folder, got the file {folder}.")
    found = []
    for path in _entries(folder):
        if not path.is_dir():
            continue
        if path.name[0] not in "._":
            found.append(path)
        elif skipped is not None:
            skipped.add("folders whose names begin with '_' or '.'; rename those that are classes", path)
    return found


def _entries(folder: Path) -> list[Path]:
    try:
        # A task's folder may be the one that the list is made in.
        return sorted(path for path in folder.iterdir() if path.name != LOCK_FILE)
    except OSError as error:
        raise LoRKDError(f"cannot read the folder {folder}: {error.strerror}.") from error


def _splits_in(folder: Path, skipped: Skipped) -> Sequence[tuple[Path, str | None]]:
    """The sub-folders that are named as splits, with their splits; none where there are no such."""
    inside = visible_folders(folder)
    splits = [(sub, SPLITS[_SPLIT_FOLDERS[sub.name.lower()]]) for sub in inside if sub.name.lower() in _SPLIT_FOLDERS]
    if splits and len(splits) != len(inside):
        odd = next(sub for sub in inside if sub.name.lower() not in _SPLIT_FOLDERS)
        raise LoRKDError(
            f"{folder} holds split folders ({', '.join(sub.name for sub, _ in splits)}) beside {odd.name!r}."
        )
    if splits:
        _skip_files(folder, skipped)
        visible_folders(folder, skipped)
    return splits


def _skip_files(folder: Path, skipped: Skipped) -> None:
    for path in _entries(folder):
        if path.is_file():
            skipped.add("files outside the class folders", path)


def _images_in(folder: Path, spatial_dims: int, skipped: Skipped, seen: set[str]) -> Iterator[Path]:
    """The images of a folder and of those below it; ``seen`` holds folders by their real paths, as links may loop."""
    for path in _entries(folder):
        if path.name[0] == "." or path.name == "__MACOSX":
            skipped.add("hidden files and folders", path)
        elif _is_series(path, spatial_dims):
            yield path
        elif path.is_dir():
            if path.name.lower() in _MASK_FOLDERS:
                skipped.add("folders of masks", path)
            elif os.path.realpath(path) in seen:
                skipped.add("links to folders that were read already", path)
            else:
                seen.add(os.path.realpath(path))
                yield from _images_in(path, spatial_dims, skipped, seen)
        else:
            reason = _no_image(path, spatial_dims)
            if reason is None:
                yield path
            else:
                skipped.add(reason, path)


def _images_here(folder: Path, spatial_dims: int) -> bool:
    return any(
        _is_series(path, spatial_dims) or (path.is_file() and _no_image(path, spatial_dims) is None)
        for path in _entries(folder)
        if path.name[0] not in "._"
    )


def _is_series(path: Path, spatial_dims: int) -> bool:
    return spatial_dims == 3 and is_series(path)


def _no_image(path: Path, spatial_dims: int) -> str | None:
    """Say why a file is no image of ``spatial_dims``; None where it is one."""
    name = path.name.lower()
    if is_dicom(path):
        return None if spatial_dims == 2 else "DICOM files outside a folder of their series"
    known = name.endswith(SUFFIXES[spatial_dims])
    if not known and name.endswith(SUFFIXES[5 - spatial_dims]):
        return f"{5 - spatial_dims}D images; --spatial_dims {5 - spatial_dims} takes those"
    ending = path.name[name.rfind(".nii") :] if known and ".nii" in name else ""
    if ending and ending not in (ending.lower(), ending.upper()):
        return "files with a suffix of small and large letters, which NIfTI's reader does not open; rename them"
    if not known and path.suffix:
        return f"files with the suffix {path.suffix}"
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError:
        return "files that cannot be read"
    if not start:
        return "empty files"
    if known or (spatial_dims == 2 and start.startswith(PICTURES)):
        return None
    return "files without a suffix that are no pictures" if spatial_dims == 2 else "files without a suffix"


def _refuse_twins(folder: Path, names: dict[str, list[Path]]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        plain = unicodedata.normalize("NFKC", name).casefold().strip()
        if seen.setdefault(plain, name) != name:
            raise LoRKDError(
                f"{folder} has two class folders whose names differ by case or blanks only, {seen[plain]!r} and "
                f"{name!r}: put their images into one, or rename one."
            )


def _set_patients(rows: list[Row]) -> None:
    """Take the first sub-folder that differs between images as the patient: ``benign/images/P1/left`` is of P1."""
    trails = [row.patient.split("/") if row.patient else [] for row in rows]
    while trails and all(trails) and len({trail[0] for trail in trails}) == 1:
        trails = [trail[1:] for trail in trails]
    for row, trail in zip(rows, trails, strict=True):
        row.patient = trail[0] if trail else None
