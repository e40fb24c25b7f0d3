"""Making a multi-task data list from what people have: the functions behind ``lorkd data``.

Images stay where they are: the list names them relative to its own folder. Each function writes
``<output>/dataset.json`` once `load_data_list` has accepted it, and returns its path. It replaces an existing list
only with ``overwrite=True``.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lorkd_monai.checks import as_path, as_value
from lorkd_monai.data.checks import NPZ_ARRAYS, check_task_name, read_origin
from lorkd_monai.data.class_folders import class_images, holds_tasks, visible_folders
from lorkd_monai.data.form import SPLITS
from lorkd_monai.data.splitting import Row, assign_splits, read_patients
from lorkd_monai.data.writing import Skipped, new_folder, new_list, relative_path
from lorkd_monai.errors import LoRKDError
from lorkd_monai.files import read_json
from lorkd_monai.transforms.loading import SUFFIXES

__all__ = ["combine", "fetch_mednist", "fetch_medmnist", "from_class_folders", "from_medmnist"]

_log = logging.getLogger(__name__)

MEDMNIST_URL = "https://zenodo.org/records/10519652/files"
_MEDMNIST = re.compile(r"[a-z0-9]+mnist[a-z0-9_]*")

Sources = str | os.PathLike | Sequence[str] | Mapping[str, str]


def from_class_folders(
    sources: Sources,
    output: str | os.PathLike,
    spatial_dims: int = 2,
    fractions: Sequence[float] = (0.7, 0.1, 0.2),
    seed: int = 0,
    patients_csv: str | None = None,
    patient_regex: str | None = None,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a classification list from folders that have a sub-folder for each class.

    One folder is a single task where its sub-folders hold no folders, or hold images beside them, or are named as
    splits; where they can be tasks and classes alike, it is refused. A task folder may hold ``train``, ``val`` and
    ``test`` first, with the class folders in them: these splits are kept. In 3D, a class holds volume files, or a
    folder of DICOM slices for each image. Images in a sub-folder of a class belong to one patient, unless
    ``patients_csv`` or ``patient_regex`` say otherwise.

    Args:
        sources: a folder with a sub-folder per task; or the task folders, as a list or as ``{task: folder}``.
        output: the folder for ``dataset.json``.
        spatial_dims: 2 or 3.
        fractions: of training, validation and test.
        seed: of the split.
        patients_csv: see `lorkd_monai.data.splitting.read_patients`.
        patient_regex: see there.
        facts: more about a task, as ``{task: {"modality": "US", "intensity": {"range": [0, 4095]}}}``.
        overwrite: replace an existing list.

    Raises:
        LoRKDError: for a folder without classes or images, or what `load_data_list` refuses.

    Example::

        from_class_folders({"breast": "ultrasound", "chest": "xray"}, "my_list", patient_regex=r"^(P\\d+)_")
    """
    with new_list(output, "classification", spatial_dims, overwrite) as new:
        for task, folder in task_folders(sources, spatial_dims, new.skipped).items():
            found = class_images(task, folder, spatial_dims, new.skipped)
            classes = sorted({row.label for row in found})
            if len(classes) < 2:
                raise LoRKDError(
                    f"{folder} must have a sub-folder with {'/'.join(SUFFIXES[spatial_dims])} images for each of two "
                    f"or more classes; found images of {len(classes)}. Where it is a class of one task, give the "
                    f"task's folder in a list: '[{folder.parent}]'"
                )
            if patients_csv is None and patient_regex is None:
                _refuse_classes_below(folder, found)
                _tell_patients(task, found)
            new.tasks[task] = {"labels": {str(i): name for i, name in enumerate(classes)}}
            new.rows += [replace(row, label=classes.index(row.label)) for row in found]
        assign_splits(new.rows, read_patients(new.rows, patients_csv, patient_regex), fractions, seed)
        return new.write(facts)


def from_medmnist(
    sources: Sources,
    output: str | os.PathLike,
    spatial_dims: int = 2,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a classification list of ``.npz`` files in MedMNIST's form; their splits are kept.

    Classes are named by the file's array ``class_names`` where it has one, else by ``facts``
    (``{task: {"labels": {"0": "malignant", …}}}``), else ``"class 0"`` and so on.

    Args:
        sources: the files, as one path, a list (the file names become the tasks), or ``{task: file}``.
        output: the folder for ``dataset.json``.
        spatial_dims: 2 or 3.
        facts: more about a task.
        overwrite: replace an existing list.

    Raises:
        LoRKDError: for a file that is missing or not in this form.
    """
    with new_list(output, "classification", spatial_dims, overwrite) as new:
        for task, file in task_folders(sources).items():
            try:
                with np.load(file, allow_pickle=False) as arrays:
                    labels = [arrays[key] for key in arrays.files if key.endswith("_labels")]
                    names = arrays["class_names"].tolist() if "class_names" in arrays.files else []
                    for key in sorted(set(arrays.files) - NPZ_ARRAYS):
                        new.skipped.add("arrays of other names than MedMNIST's", f"{file}: {key}")
            except Exception as error:  # zip, value and system errors alike
                raise LoRKDError(f"{file} is no npz file of plain arrays: {error}") from error
            if not labels or any(part.dtype.kind not in "ui" or not part.size for part in labels):
                raise LoRKDError(
                    f"{file} is not in MedMNIST's form: it needs train_labels and others of whole numbers."
                )
            count = max(2, max(int(part.max()) for part in labels) + 1)
            names = names if len(names) >= count else [f"class {i}" for i in range(count)]
            labels_of_ids = {str(i): str(name) for i, name in enumerate(names)}
            new.tasks[task] = {"npz": relative_path(str(file), new.folder), "labels": labels_of_ids}
        return new.write(facts)


def fetch_medmnist(
    names: str | Sequence[str],
    output: str | os.PathLike,
    spatial_dims: int = 2,
    base_url: str = MEDMNIST_URL,
    md5: Mapping[str, str] | None = None,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    overwrite: bool = False,
) -> Path:
    """Download MedMNIST files through MONAI's downloader into ``output`` and write a list of them.

    Args:
        names: such as ``"breastmnist"``, ``"pneumoniamnist_64"`` or, in 3D, ``"adrenalmnist3d"``.
        output: the folder for the files and ``dataset.json``.
        spatial_dims: 2 or 3.
        base_url: where the files are.
        md5: checksums of files, ``{name: md5}``, which are checked where given.
        facts: more about a task.
        overwrite: replace an existing list; files that were fetched before are kept.

    Raises:
        LoRKDError: for a name that is not MedMNIST's, or a download that fails.
    """
    from monai.apps import download_url

    folder = as_path(output, "output")
    files = {}
    with new_folder(folder, overwrite):
        for name in [names] if isinstance(names, str) else names:
            if not isinstance(name, str) or not _MEDMNIST.fullmatch(name):
                raise LoRKDError(f"expected names of MedMNIST sets such as 'breastmnist', got {name!r}.")
            files[name] = str(folder / f"{name}.npz")
            try:
                download_url(f"{base_url}/{name}.npz", files[name], hash_val=(md5 or {}).get(name), hash_type="md5")
            except Exception as error:  # network errors come in many kinds
                raise LoRKDError(
                    f"cannot fetch {name} from {base_url}: {error}\nWith a copy of the file, use from_medmnist instead."
                ) from error
        return from_medmnist(files, folder, spatial_dims, facts, overwrite)


def fetch_mednist(
    output: str | os.PathLike,
    fractions: Sequence[float] = (0.7, 0.1, 0.2),
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Download MedNIST through MONAI's own data set into ``output`` and write a list with one task, ``mednist``.

    Its subjects are not published: one person may be in two splits.

    Raises:
        LoRKDError: where the download fails.
    """
    from monai.apps import MedNISTDataset

    folder = as_path(output, "output")
    with new_folder(folder, overwrite):
        try:
            MedNISTDataset(str(folder), "training", download=True, cache_num=0, progress=False)
        except Exception as error:  # network errors come in many kinds
            raise LoRKDError(f"cannot fetch MedNIST through MONAI: {error}") from error
        sources = {"mednist": str(folder / MedNISTDataset.dataset_folder_name)}
        return from_class_folders(sources, folder, 2, fractions, seed, overwrite=overwrite)


def combine(
    lists: Sequence[str | os.PathLike], output: str | os.PathLike, kind: str, spatial_dims: int, overwrite: bool = False
) -> Path:
    """Write one list of the tasks of several; their splits are kept.

    Raises:
        LoRKDError: where two lists have a task of one name, or what `load_data_list` refuses.
    """
    lists = _listed(lists)
    with new_list(output, kind, spatial_dims, overwrite) as new:
        for path in map(Path, [lists] if isinstance(lists, (str, os.PathLike)) else lists):
            file = path / "dataset.json" if path.is_dir() else path
            folder = file.parent.resolve()
            content = read_json(file, "expected a data list")
            try:
                own, origin = dict(content["tasks"]), read_origin(content)
                for split in SPLITS:
                    for item in content.get(split, []):
                        image, label = (_absolute(item[key], folder) for key in ("image", "label"))
                        new.rows.append(Row(item["task"], image, label, split))
            except (ValueError, KeyError, TypeError) as error:
                raise LoRKDError(f"{file} is no data list of tasks: {type(error).__name__} {error}") from error
            for name, entry in own.items():
                if name in new.tasks:
                    raise LoRKDError(f"two of the lists have a task {name!r}; rename one of them.")
                new.tasks[name] = {**{key: value for key, value in origin.items() if value is not None}, **entry}
                if "npz" in entry:
                    new.tasks[name]["npz"] = relative_path(str(folder / entry["npz"]), new.folder)
        return new.write()


def task_folders(sources: Sources, spatial_dims: int | None = None, skipped: Skipped | None = None) -> dict[str, Path]:
    """Return ``{task: path}`` of what a builder was given; with ``spatial_dims`` one folder may hold the task folders.

    Raises:
        LoRKDError: for a missing path, or a task name that is not allowed or given twice.
    """
    if isinstance(sources, str) and sources.startswith("{") and not os.path.exists(sources):
        sources = read_mapping(sources)
    sources = _listed(sources)
    if isinstance(sources, (str, os.PathLike)):
        root = Path(sources).expanduser()
        inside = visible_folders(root) if spatial_dims and root.is_dir() else []
        several = bool(spatial_dims and inside and holds_tasks(root, inside, spatial_dims))
        sources = [str(path) for path in visible_folders(root, skipped)] if several else [str(root)]
    if not isinstance(sources, (Mapping, Sequence)):
        raise LoRKDError(f"sources: expected a path, several as '[path,path]', or '{{task: path}}', got {sources!r}")
    pairs = list(sources.items()) if isinstance(sources, Mapping) else [(None, source) for source in sources]
    found: dict[str, Path] = {}
    for name, source in pairs:
        path = as_path(source, "sources").expanduser().resolve()
        if not path.exists():
            raise LoRKDError(f"expected a task's images at {path}, and there is nothing.")
        task = _task_name(path) if name is None else name
        fault = check_task_name(task)
        if fault:
            raise LoRKDError(f"{fault} (for {path}; give the tasks as {{name: path}} to name them yourself)")
        if task in found:
            raise LoRKDError(f"two tasks would be named {task!r}: {found[task]} and {path}; give {{name: path}}.")
        found[task] = path
    if not found:
        raise LoRKDError("there is no task: give at least one folder or file.")
    return found


def _task_name(path: Path) -> str:
    name = path.name if path.is_dir() else path.name.split(".")[0]
    name, numbered = re.subn(r"^(Task|Dataset)\d+_", "", name)
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_-")
    return name.lower() if numbered else name


def read_mapping(text: str) -> dict[str, str]:
    """Read ``{breast: folder/a, chest: folder/b}`` as a command line has it: paths without quotes, as in YAML.

    Raises:
        LoRKDError: for text that is no such mapping.
    """
    mapping = as_value(text)
    if not isinstance(mapping, dict) or not all(isinstance(path, str) for path in mapping.values()):
        raise LoRKDError(f"expected tasks as '{{name: path, other: path}}', got {text}.")
    return {str(name): path for name, path in mapping.items()}


def _listed(text: Any) -> Any:
    """Read ``[folder/a, folder/b]`` as a command line has it; leave everything else as it is."""
    if not isinstance(text, str) or not text.startswith("[") or os.path.exists(text):
        return text
    found = as_value(text)
    if not isinstance(found, list) or not all(isinstance(path, str) for path in found):
        raise LoRKDError(f"expected paths as '[path, other]', got {text}.")
    return found


def _refuse_classes_below(folder: Path, found: Sequence[Row]) -> None:
    """Refuse a folder of tasks that was given as one task: it looks like that if all classes have the same folders."""
    below: dict[str, set[str | None]] = {}
    for row in found:
        below.setdefault(row.label, set()).add(row.patient)
    first, *others = below.values()
    folders = sorted(name for name in first if name is not None)
    if len(folders) < 2 or len(folders) < len(first) or any(names != first for names in others):
        return
    if all(any(char.isdigit() for char in name) for name in folders):
        return
    names = ", ".join(folders[:3])
    raise LoRKDError(
        f"{folder} must have a sub-folder of images for each class; found images of 0: all are in the sub-folders "
        f"{names} of {', '.join(sorted(below)[:3])}, which may be tasks with these classes. For tasks give '{folder}' "
        "without brackets; for one task say which images are of one patient, with --patients_csv or --patient_regex."
    )


def _tell_patients(task: str, found: Sequence[Row]) -> None:
    patients = [row.patient for row in found if row.patient]
    if patients:
        names = sorted(set(patients))
        shown = ", ".join(names[:3] + ["…"] * (len(names) > 3))
        _log.info(
            f"task {task!r}: {len(patients)} images are in sub-folders of their classes; each of the {len(names)} "
            f"({shown}) is taken for a patient"
        )


def _absolute(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_absolute(part, folder) for part in value]
    return os.path.join(folder, value) if isinstance(value, str) else value
