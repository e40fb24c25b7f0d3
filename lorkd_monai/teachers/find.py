"""The teacher of a run: found, loaded, and what a student takes from it at the start."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorkd_monai.data import DataList
from lorkd_monai.errors import LoRKDError
from lorkd_monai.experts.weight_selection import select_weights
from lorkd_monai.networks import LoRKDNet, TaskChannels
from lorkd_monai.tasks import image_sides
from lorkd_monai.teachers.bundle import load_teacher, teacher_from_checkpoint
from lorkd_monai.teachers.cache import CachedTeacher
from lorkd_monai.teachers.channels import channels_by_name
from lorkd_monai.teachers.intensity import StudentImages
from lorkd_monai.teachers.teacher import Teacher, check_channels
from lorkd_monai.transforms import default_intensity

_log = logging.getLogger(__name__)

__all__ = ["find_teacher", "knows_tasks", "start_from_teacher"]


def find_teacher(
    teacher_bundle: str | os.PathLike | None,
    data: DataList,
    transfer_weight: float = 1.0,
    cache: bool | int = False,
    cache_dir: str | os.PathLike = "teacher_cache",
    intensity: str | Mapping[str, Any] = "auto",
    backbone: Mapping[str, Any] | functools.partial | None = None,
    split: str = "training",
    in_channels: int | None = None,
    image_size: int | Sequence[int] | None = None,
    from_files: bool = False,
) -> Teacher | CachedTeacher | None:
    """The teacher of a decomposition from a MONAI bundle folder, or from a checkpoint and its network's config.

    Only the tasks with images in ``split`` are looked up: the teacher need not know the others. One line of the
    log says what the teacher is given.

    Args:
        teacher_bundle: the folder; or a weights file of ``backbone``, whose output must then hold the classes of all
            those tasks side by side, in the order of the data list.
        data: the data list, whose classes are looked up among the teacher's by name.
        transfer_weight: 0 trains without a teacher: None is returned; all training images need labels then.
        cache: keep the teacher's answers on disk, so that it runs once for each image. True shows every image as it
            is, without augmentation; a number shows it in so many fixed ways, see `CachedTeacher`.
        cache_dir: folder of the answers.
        intensity: what the teacher wants of the student's images; "auto": what its bundle says, see `load_teacher`.
        backbone: MONAI config of the network of a weights file (``teacher_backbone`` in the bundles).
        split: the images that it teaches or is measured on.
        in_channels, image_size: of the student's images, where they are known: the teacher's are checked against them.
        from_files: it is for a `DecompositionTrainer` with a `TaskDataset`, which shows it the values of the volumes'
            files. Else these are computed from the student's images, and a teacher that this does not suit is refused.

    Raises:
        LoRKDError: there is no such folder or file, or it does not fit.
    """
    if transfer_weight == 0:
        if split == "training" and data.unlabelled:
            raise LoRKDError(
                f"{data.unlabelled} training images of {data.name!r} have no label and learn from a teacher alone, and "
                "there is none (transfer_weight is 0): name one with --teacher_bundle, or leave these images out of "
                "the data list"
            )
        return None
    if teacher_bundle is None:
        raise LoRKDError(
            f"transfer_weight is {transfer_weight}, and there is no teacher: name one with --teacher_bundle, or train "
            "from the labels alone (--transfer_weight 0)"
        )
    present = _present(data, split)
    place = Path(teacher_bundle)
    if place.is_file() and backbone is not None:
        teacher = _checkpoint_teacher(place, backbone, data, present)
    elif place.is_dir():
        stored = [item["image"] for item in data.split(split)]
        student = StudentImages(_ranges(data), present, stored, in_channels, from_files)
        teacher = load_teacher(place, data.tasks, student, intensity)
        _check_colours(place.name, teacher, data, present, in_channels)
    else:
        raise LoRKDError(
            f"no teacher at {place}: run `pretraining` with the same --output_dir first, name the folder of a "
            "MONAI bundle (or a weights file of teacher_backbone) with --teacher_bundle, or train without one "
            "(--transfer_weight 0)"
        )
    told = _given(teacher, data, present, in_channels, image_size)
    _log.info("The teacher %s is given %s.", place.name, told)
    return CachedTeacher(teacher, cache_dir, int(cache)) if cache else teacher


def start_from_teacher(network: LoRKDNet, teacher: Teacher | CachedTeacher | None, init: str = "auto") -> None:
    """Give a decomposition its first weights, before it is trained.

    Args:
        network: the decomposition; changed in place.
        teacher: as `find_teacher` gives it.
        init: ``"random"``: as it is. ``"teacher"``: a selection of the teacher's weights, see `select_weights`;
            ``"auto"``: that, where there is a teacher whose layers have the names of at least half of the student's.

    Raises:
        LoRKDError: ``"teacher"``, and there is none or none of its weights fit.
    """
    if init == "random" or (init == "auto" and teacher is None):
        return
    if teacher is None:
        raise LoRKDError("init is 'teacher', and there is none: name one with --teacher_bundle, or give --init random")
    taken = select_weights(network, teacher.network, 0.5 if init == "auto" else 0.0)
    if taken:
        _log.info("The shared network starts from a selection of the teacher's weights (%d tensors).", taken)
    else:
        _log.info("The shared network starts at random: its layers are not those of the teacher.")


def _ranges(data: DataList) -> dict[str, tuple[float, float] | None]:
    found = {name: default_intensity(task, data.spatial_dims).get("range") for name, task in data.tasks.items()}
    return {name: None if own is None else (float(own[0]), float(own[1])) for name, own in found.items()}


def _check_colours(
    name: str, teacher: Teacher, data: DataList, present: Sequence[str], in_channels: int | None
) -> None:
    """Refuse tasks whose own images have channels that the student's lack and the teacher wants."""
    if in_channels is None or teacher.in_channels is None:
        return
    coloured = [task for task in present if data.spatial_dims == 2 and data.tasks[task].channels == 3]
    if coloured and in_channels == 1 and teacher.in_channels == 3:
        raise LoRKDError(
            f"the teacher {name} takes colours and the images of {', '.join(coloured)} have them, "
            "but the student's are grey: give --in_channels 3"
        )
    for task in present:
        own = data.tasks[task].channels
        if own is not None and own != in_channels:  # they are repeated for the student, or become grey
            check_channels(teacher.in_channels, own, data.spatial_dims, f"the teacher {name}")


def _given(
    teacher: Teacher,
    data: DataList,
    present: Sequence[str],
    in_channels: int | None,
    image_size: int | Sequence[int] | None,
) -> str:
    """What a teacher is given, for one line of the log."""
    size = image_sides(image_size, data.spatial_dims) if image_size else ()
    channels = teacher.in_channels or in_channels or "?"
    shape = " × ".join(map(str, [channels, *size])) if size else f"{channels} channel{'' if channels == 1 else 's'}"
    spacings = {data.tasks[task].spacing for task in present} if data.spatial_dims == 3 else set()
    mm = " or ".join("as stored" if s is None else f"{' × '.join(f'{v:g}' for v in s)} mm" for s in spacings)
    view = teacher.intensity
    told = "axes and values as the student's" if view is None or not view.told else view.told
    return f"{shape}{f', spacing {mm}' if mm else ''}, {told}"


def _present(data: DataList, split: str) -> list[str]:
    """The tasks with images in a split."""
    found = {item["task"] for item in data.split(split)}
    return [name for name in data.tasks if name in found]


def knows_tasks(teacher: Teacher | CachedTeacher, data: DataList, split: str) -> bool:
    """Whether the teacher has logits for all tasks of a split."""
    return bool(teacher.has_logits([data.tasks[name].index for name in _present(data, split)]).all())


def _checkpoint_teacher(
    weights: str | os.PathLike,
    backbone: Mapping[str, Any] | functools.partial,
    data: DataList,
    present: Sequence[str],
) -> Teacher:
    view = TaskChannels.build(backbone, {name: data.num_classes[name] for name in present})
    labels = {name: data.tasks[name].labels for name in present}
    names = [f"{name}: {classes[c]}" for name, classes in labels.items() for c in sorted(classes)]
    found = channels_by_name(dict(enumerate(names)), labels)
    return teacher_from_checkpoint(weights, view.config, names, data.tasks, channels=found)  # type: ignore[arg-type]
