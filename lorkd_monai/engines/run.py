"""The pieces that the training bundles' configs put together: teacher, objective, schedule, figures."""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import monai
import torch
from monai.inferers import Inferer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Sampler

from lorkd_monai import __version__
from lorkd_monai.bundle.facts import teacher_facts
from lorkd_monai.checkpoints.weights import load_weights, read_decomposition_spec
from lorkd_monai.data import DataList, TaskBatchSampler, TaskDataset
from lorkd_monai.data.identity import split_digests, task_identity
from lorkd_monai.engines.evaluation import Figures, evaluate_tasks, figures_table, write_figures
from lorkd_monai.engines.trained_tasks import as_trained, other_images
from lorkd_monai.engines.trainer import show_volumes
from lorkd_monai.errors import LoRKDError
from lorkd_monai.experts.weight_selection import select_weights
from lorkd_monai.losses import FeatureTransferLoss, LoRKDLoss
from lorkd_monai.networks import LoRKDNet, TaskChannels
from lorkd_monai.teachers.bundle import load_teacher, teacher_from_checkpoint
from lorkd_monai.teachers.cache import CachedTeacher
from lorkd_monai.teachers.channels import channels_by_name
from lorkd_monai.teachers.teacher import Teacher, check_channels
from lorkd_monai.transforms import default_intensity

_log = logging.getLogger(__name__)

__all__ = [
    "cosine_schedule",
    "figures_of",
    "find_teacher",
    "make_objective",
    "report_figures",
    "run_facts",
    "start_from_teacher",
    "test_loader",
    "train_loader",
]


def train_loader(
    dataset: Dataset, sampler: Sampler, batch_size: int, num_workers: int = 0, tasks_per_batch: int | None = None
) -> DataLoader:
    """Batches for training; a last batch that is not full is left out, as batch norm may find a single sample in it.

    ``tasks_per_batch`` makes batches of so many tasks with as many samples each, see `TaskBatchSampler`; None: all
    tasks mixed, each as it was drawn.

    Raises:
        LoRKDError: a batch size below 1, or more tasks in a batch than samples.
    """
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise LoRKDError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
    if tasks_per_batch is not None:
        batches = TaskBatchSampler(sampler, batch_size, tasks_per_batch)
        return DataLoader(dataset, batch_sampler=batches, num_workers=num_workers)
    full = len(sampler) >= batch_size
    return DataLoader(dataset, batch_size, sampler=sampler, drop_last=full, num_workers=num_workers)


def test_loader(dataset: Dataset, batch_size: int = 64, sampler: Sampler | None = None) -> DataLoader:
    """Batches for evaluation, in order; images of different sizes need ``batch_size=1``.

    ``sampler`` chooses the images of this process, where several share the work; None: all.
    """
    return DataLoader(dataset, batch_size, shuffle=False, sampler=sampler)


def run_facts(
    network: LoRKDNet,
    data: DataList,
    teacher_bundle: str | os.PathLike | None,
    max_epochs: int,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Facts on a decomposition for the READMEs of its experts.

    ``teacher`` is a function: what the teacher costs is measured when the experts are written, see `resolved_facts`.
    """
    spec, info = network.spec(), network.info
    counts = {split: len(data.split(split)) for split in ("training", "validation", "test")}
    return {
        "data": f"{data.name}: "
        + ", ".join(f"{n} {split} images" for split, n in counts.items())
        + (f" ({data.unlabelled} training images without a label)" if data.unlabelled else ""),
        "tasks": ", ".join(f"{name} ({n} classes)" for name, n in network.num_classes.items()),
        "experts": f"rank {_words(spec['rank'])}, layout {spec['layout']}, norm {spec['norm']}",
        "epochs": max_epochs,
        "settings": ", ".join(f"{key} {_words(value)}" for key, value in settings.items()),
        "augmentation": {key: settings[key] for key in ("rotate", "flip_axes") if key in settings},
        "teacher": functools.partial(teacher_facts, teacher_bundle, info["spatial_dims"], info["image_size"]),
        "versions": f"lorkd-monai {__version__}, monai {monai.__version__}, torch {torch.__version__}",
    }


def _words(value: Any) -> str:
    """A setting as a person writes it: no brackets, and one number where all are the same."""
    if isinstance(value, Mapping):
        values = list(value.values())
        if values and all(v == values[0] for v in values):
            return _words(values[0])
        return " and ".join(f"{_words(v)} ({k})" for k, v in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return " ".join(map(_words, value)) or "none"
    return str(value)


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

    Only the tasks with images in ``split`` are looked up: the teacher needs to know nothing of the others. What it is
    given of them is said in one line of the log.

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
        split: what it is to teach or to be measured on.
        in_channels, image_size: of the student's images, where they are known: the teacher's are checked against them.
        from_files: it is for a `DecompositionTrainer` with a `TaskDataset`, which shows it the values of the volumes'
            files. Else they are made of the student's, and the teacher is refused where these do not do.

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
    if Path(teacher_bundle).is_file() and backbone is not None:
        teacher = _checkpoint_teacher(teacher_bundle, backbone, data, present)
        _log.info("%s", _given(Path(teacher_bundle).name, teacher, data, present, in_channels, image_size))
        return CachedTeacher(teacher, cache_dir, int(cache)) if cache else teacher
    if not Path(teacher_bundle).is_dir():
        raise LoRKDError(
            f"no teacher at {teacher_bundle}: run `pretraining` with the same --output_dir first, name the folder of a "
            "MONAI bundle (or a weights file of teacher_backbone) with --teacher_bundle, or train without one "
            "(--transfer_weight 0)"
        )
    seen = {name: default_intensity(task, data.spatial_dims).get("range") for name, task in data.tasks.items()}
    ranges = {name: None if own is None else (float(own[0]), float(own[1])) for name, own in seen.items()}
    teacher = load_teacher(
        teacher_bundle, data.tasks, intensity=intensity, ranges=ranges, only=present, image_channels=in_channels,
        from_files=from_files,
        images=[item["image"] for item in data.split(split)],
    )  # fmt: skip
    coloured = [name for name in present if data.spatial_dims == 2 and data.tasks[name].channels == 3]
    if coloured and in_channels == 1 and teacher.in_channels == 3:
        raise LoRKDError(
            f"the teacher {Path(teacher_bundle).name} takes colours and the images of {', '.join(coloured)} have them, "
            "but the student's are grey: give --in_channels 3"
        )
    for task in present if in_channels is not None and teacher.in_channels is not None else ():
        own = data.tasks[task].channels
        if own is not None and own != in_channels:  # they are repeated for the student, or become grey
            check_channels(teacher.in_channels, own, data.spatial_dims, f"the teacher {Path(teacher_bundle).name}")
    _log.info("%s", _given(Path(teacher_bundle).name, teacher, data, present, in_channels, image_size))
    return CachedTeacher(teacher, cache_dir, int(cache)) if cache else teacher


def _given(
    name: str,
    teacher: Teacher,
    data: DataList,
    present: Sequence[str],
    in_channels: int | None,
    image_size: int | Sequence[int] | None,
) -> str:
    """What a teacher is given, in one line."""
    size = [image_size] * data.spatial_dims if isinstance(image_size, int) else list(image_size or [])
    channels = teacher.in_channels or in_channels or "?"
    shape = " × ".join(map(str, [channels, *size])) if size else f"{channels} channel{'' if channels == 1 else 's'}"
    spacings = {data.tasks[task].spacing for task in present} if data.spatial_dims == 3 else set()
    mm = " or ".join("as stored" if s is None else f"{' × '.join(f'{v:g}' for v in s)} mm" for s in spacings)
    view = teacher.intensity
    told = "axes and values as the student's" if view is None or not view.told else view.told
    return f"The teacher {name} is given {shape}{f', spacing {mm}' if mm else ''}, {told}."


def start_from_teacher(network: LoRKDNet, teacher: Teacher | CachedTeacher | None, init: str = "auto") -> None:
    """Give a decomposition its first weights, before it is trained.

    Args:
        network: the decomposition; changed in place.
        teacher: as `find_teacher` gives it.
        init: ``"random"``: as it is. ``"teacher"``: a selection of the teacher's weights, see `select_weights`;
            ``"auto"``: that, where there is a teacher whose layers have the names of at least half of the student's.

    Raises:
        LoRKDError: ``"teacher"``, and there is none or nothing of it fits.
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


def _present(data: DataList, split: str) -> list[str]:
    """The tasks with images in a split."""
    found = {item["task"] for item in data.split(split)}
    return [name for name in data.tasks if name in found]


def _knows(teacher: Teacher | CachedTeacher, data: DataList, split: str) -> bool:
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
    return teacher_from_checkpoint(weights, view.config, names, data.tasks, channels=found)


def make_objective(
    network: LoRKDNet | nn.Module,
    teacher: Teacher | None,
    data: DataList,
    dataset: Dataset,
    transfer_weight: float = 1.0,
    temperature: float = 4.0,
    transfer_positions: str = "by_class",
) -> LoRKDLoss:
    """The objective of a run: cross entropy or DiceCE, and the transfer that its teacher allows.

    Tasks that the teacher has classes for are distilled from its logits; where it lacks a task, that task is distilled
    from pooled features through a learned projection.

    Args:
        network: the network to train.
        teacher: None: no transfer.
        data: the data list.
        dataset: training images, for the width of the features.
        transfer_weight: of the transfer beside the task loss.
        temperature: of the transfer.
        transfer_positions: "equal" or "by_class", see `transfer_loss`.
    """
    features = None
    if teacher is not None and not _knows(teacher, data, "training"):
        with torch.no_grad():
            device = next(network.parameters()).device
            image, task = dataset[0]["image"][None].to(device), int(dataset[0]["task"])
            training = network.training
            student = network.eval()(image, task, return_features=True)[1]
            network.train(training)
            width = teacher.to(device)(image, task, return_features=True)[1].shape[1]
        features = FeatureTransferLoss(student.shape[1], width, temperature)
    return LoRKDLoss(
        "ce" if data.kind == "classification" else "dice_ce",
        transfer_weight if teacher is not None else 0.0,
        temperature,
        mode="softmax" if teacher is None else teacher.activation,
        transfer_positions=transfer_positions,
        tasks=data.num_classes,
        feature_transfer=features,
        feature_weight=transfer_weight,
    )


def cosine_schedule(optimizer: Optimizer, max_epochs: int, warmup: int = 1) -> LambdaLR:
    """Learning rate by epoch: a linear warm-up, then a half cosine towards 0 at ``max_epochs``."""

    def factor(epoch: int) -> float:
        if epoch < warmup:
            return (epoch + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(1, max_epochs - warmup)))

    return LambdaLR(optimizer, factor)


def figures_of(
    loader: DataLoader,
    data: DataList,
    device: torch.device | str,
    path: str | os.PathLike,
    inferer: Inferer | None = None,
) -> Any:
    """A function of a network that measures it on ``loader``, writes the figures to ``path`` and returns them.

    Without images there are no figures and no file: `load_data_list` told so before the run.
    """

    def measure(network: nn.Module) -> Figures:
        if not len(loader):
            _log.warning("%s has no test images: no figures are measured.", data.name)
            return {}
        figures = evaluate_tasks(network, loader, data, device, inferer)
        write_figures(path, figures)
        return figures

    return measure


def report_figures(
    network: LoRKDNet,
    weights: str | os.PathLike,
    loader: DataLoader,
    data: DataList,
    device: torch.device | str,
    path: str | os.PathLike,
    teacher_bundle: str | os.PathLike | None,
    inferer: Inferer | None = None,
    teacher_intensity: str | Mapping[str, Any] = "auto",
) -> Mapping[str, Figures]:
    """Measure the experts, and the teacher beside them where there is one; print a table and write it as JSON.

    Args:
        network: the decomposed network.
        weights: file of its weights.
        loader: the images to measure on.
        data: the data list.
        device: where to run.
        path: JSON file to write: ``{"experts": …, "teacher": …, "data": …}``, the last with what they were measured on.
        teacher_bundle: folder of the teacher; left out where it does not exist or does not know all tasks measured.
        inferer: such as sliding windows.
        teacher_intensity: what the teacher wants of the images, see `find_teacher`.

    Raises:
        LoRKDError: there are no test images, no weights yet, or they belong to another decomposition or were trained
            on tasks that the list describes in another way, see `as_trained`.
    """
    if not len(loader):
        raise LoRKDError(
            f"the data list {data.name!r} has no test images with labels to measure on: give it some in 'test', or "
            "name a list that has them with --dataset_dir"
        )
    if not Path(weights).exists():
        run_id = "adding" if Path(weights).parent.name == "adding" else "training"
        raise LoRKDError(f"no trained weights at {weights}: run `{run_id}` with the same --output_dir first")
    state = load_weights(weights)
    network.load_state_dict(state)
    info = read_decomposition_spec(state, str(weights)).get("info") or {}
    trained = as_trained(data, info, str(weights))
    loader = _prepared_as(trained, data, loader)
    figures: dict[str, Any] = {"experts": evaluate_tasks(network.eval(), loader, trained, device, inferer)}
    if teacher_bundle is not None and Path(teacher_bundle).is_dir():
        teacher = find_teacher(teacher_bundle, trained, intensity=teacher_intensity, split="test", from_files=True)
        if _knows(teacher, trained, "test"):
            if teacher.intensity is not None and teacher.intensity.from_files:
                show_volumes(loader, teacher.intensity)
            figures["teacher"] = evaluate_tasks(teacher, loader, trained, device, inferer)
    tasks = {name: task_identity(task, data.spatial_dims) for name, task in trained.tasks.items()}
    write_figures(path, {**figures, "data": {"name": data.name, "tasks": tasks, "images": split_digests(data)}})
    if other_images(data, info, "test"):
        print("These are other test images, or other labels, than those of the list of the training.\n")
    score = "balanced_accuracy" if data.kind == "classification" else "dice"
    print(f"{score} on {len(loader.dataset)} images, with 95 % bootstrap intervals\n")
    print(figures_table(figures, score, data.scored))
    print(f"\nAll figures: {path}")
    return figures


def _prepared_as(trained: DataList, data: DataList, loader: DataLoader) -> DataLoader:
    """The loader of images that are prepared as a decomposition learned them, where the list says otherwise."""

    def preparation(tasks: DataList) -> dict[str, Any]:
        return {
            name: (default_intensity(task, data.spatial_dims), task.spacing and tuple(task.spacing))
            for name, task in tasks.tasks.items()
        }

    if preparation(trained) == preparation(data):
        return loader
    images = loader.dataset
    return test_loader(TaskDataset(trained, "test", images.in_channels, images.image_size), loader.batch_size)
