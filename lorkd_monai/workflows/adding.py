"""Add tasks to a trained decomposition, or remove one; the other tasks stay bit-identical."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lorkd_monai.bundle.export import work_of_info
from lorkd_monai.checkpoints.packs import fingerprint
from lorkd_monai.checkpoints.weights import (
    check_backbone,
    load_decomposition,
    load_weights,
    read_decomposition_spec,
)
from lorkd_monai.data import DataList
from lorkd_monai.data.form import SPLITS
from lorkd_monai.data.identity import split_digests
from lorkd_monai.engines.trained_tasks import as_trained
from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import LoRKDNet

__all__ = [
    "added_tasks",
    "network_with_new_tasks",
    "network_without_task",
    "new_tasks_of",
    "trained_info",
    "what_is_added",
]


def trained_info(checkpoint: str | os.PathLike) -> dict[str, Any]:
    """The info in a checkpoint of `training`: kind, image_size, in_channels, tasks, …; see `network_info`.

    Raises:
        LoRKDError: there is no such checkpoint, or it has no such info.
    """
    return _trained_spec(checkpoint)["info"]


def _trained_spec(checkpoint: str | os.PathLike) -> dict[str, Any]:
    if not Path(checkpoint).is_file():
        raise LoRKDError(
            f"no trained decomposition at {checkpoint}: run `training` with the same --output_dir first, or name its "
            "checkpoint with --trained"
        )
    spec = read_decomposition_spec(load_weights(checkpoint), str(checkpoint))
    work_of_info(spec.get("info") or {})  # raises where something is missing
    return spec


def network_with_new_tasks(
    checkpoint: str | os.PathLike,
    data: DataList,
    rank: int | Mapping[str, int] | None = None,
    in_channels: int | None = None,
    image_size: int | Sequence[int] | None = None,
    new_tasks: Sequence[str] | None = None,
    replace: bool = False,
    backbone: Mapping[str, Any] | None = None,
) -> LoRKDNet:
    """Load a trained decomposition and add a new expert and head for each new task of a data list.

    Only the new experts, heads and task norms can be trained: the outputs of the other tasks stay bit-identical. New
    tasks, and replaced ones, come after the others.

    Args:
        checkpoint: of the decomposition.
        data: the data list; its tasks that are not added are ignored.
        rank: of the new experts, one for all or one for each; None: that of the first task, or of the task replaced.
        in_channels: channels of the images to train on; must be those of the decomposition.
        image_size: size of the images to train on; must be that of the decomposition.
        new_tasks: which tasks of the data list to add; None: all that the decomposition does not have.
        replace: train existing tasks of ``new_tasks`` anew.
        backbone: config of the backbone, used if the checkpoint has none that may be built.

    Raises:
        LoRKDError: there is no checkpoint or no new task; a task exists already, or is not in the data list, or has no
            training images; the kind of work, channels or image size differ from the decomposition's.
    """
    spec = _trained_spec(checkpoint)
    info, ranks = spec["info"], spec["rank"]
    net = load_decomposition(checkpoint, _needed(backbone, spec))
    new = _checked_names(net, data, new_tasks, replace, str(checkpoint))
    wanted = {"kind": data.kind, "spatial_dims": data.spatial_dims, "in_channels": in_channels}
    wanted["image_size"] = list(image_size) if isinstance(image_size, (list, tuple)) else image_size
    for key, value in wanted.items():
        if value is not None and info.get(key, value) != value:
            raise LoRKDError(f"{key} is {value!r}, but the decomposition {checkpoint} was made for {info[key]!r}")
    for name in new:
        if name in net.tasks:
            net.remove_task(name)
    for name in new:
        own = rank.get(name) if isinstance(rank, Mapping) else rank
        net.add_task(name, data.tasks[name].num_classes, ranks.get(name) if own is None else own, freeze=True)
    for name in new:  # each call froze what the ones before it had added
        for tensor in net.expert_tensors(net.tasks.index(name)).values():
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(True)
    _describe(net, {**info["tasks"], **{name: dataclasses.asdict(data.tasks[name]) for name in new}})
    net.info["images"] = split_digests(data)
    return net


def network_without_task(
    checkpoint: str | os.PathLike, task: str, backbone: Mapping[str, Any] | None = None
) -> LoRKDNet:
    """Load a decomposition and remove one of its tasks; the outputs of the others stay bit-identical.

    Raises:
        LoRKDError: there is no such checkpoint or task, or the task is the last one.
    """
    net = load_decomposition(checkpoint, backbone)
    net.remove_task(task)
    if "tasks" in net.info:
        _describe(net, net.info["tasks"])
    return net


def new_tasks_of(data: DataList, net: LoRKDNet) -> DataList:
    """The data list of an `adding` run: all tasks of ``net``, and the images that the run needs.

    Training and validation images are those of the new tasks, see :func:`network_with_new_tasks`. Test images are
    those of all tasks that the list and the network share.

    Args:
        data: the data list with the new tasks.
        net: from :func:`network_with_new_tasks`.

    Raises:
        LoRKDError: the list describes a task in another way than the decomposition, see `as_trained`.
    """
    new, trained = added_tasks(net), as_trained(data, net.info, "the decomposition")
    known = trained.tasks
    kept = {split: known if split == "test" else new for split in SPLITS}
    items: dict[str, Any] = {
        split: [item for item in data.split(split) if item["task"] in kept[split]] for split in SPLITS
    }
    return dataclasses.replace(trained, **items)


def added_tasks(net: LoRKDNet) -> list[str]:
    """The tasks whose experts can be trained."""
    return [
        name
        for index, name in enumerate(net.tasks)
        if any(tensor.requires_grad for tensor in net.expert_tensors(index).values())
    ]


def what_is_added(net: LoRKDNet) -> dict[str, Any]:
    """What must be the same to resume an interrupted run: the shared weights, the new tasks and their ranks."""
    ranks = net.spec()["rank"]
    return {"shared_weights": fingerprint(net), "new_tasks": {name: ranks[name] for name in added_tasks(net)}}


def _needed(backbone: Mapping[str, Any] | None, spec: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """``backbone`` if a checkpoint has no config of its own, or one that may not be built; else None."""
    try:
        check_backbone(spec, "")
    except LoRKDError:
        return backbone
    return None


def _checked_names(net: LoRKDNet, data: DataList, names: Any, replace: bool, source: str) -> list[str]:
    if names is None:
        if replace:
            raise LoRKDError("replace: name the tasks to train anew with --new_tasks")
        names = [name for name in data.tasks if name not in net.tasks]
        if not names:
            raise LoRKDError(
                f"nothing to add: the decomposition {source} knows all tasks of {data.name!r} already "
                f"({', '.join(data.tasks)}). Give a new task another name, or train an existing one anew: "
                "--new_tasks \"['NAME']\" --replace True"
            )
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise LoRKDError("new_tasks is empty: expected names of tasks, or null for all that are new")
    unknown = [name for name in names if name not in data.tasks]
    if unknown:
        raise LoRKDError(
            f"new_tasks: the data list {data.name!r} has no task {unknown[0]!r}; its tasks are {', '.join(data.tasks)}"
        )
    existing = [name for name in names if name in net.tasks]
    if existing and not replace:
        raise LoRKDError(
            f"task {existing[0]!r} exists already in {source}: give the new one another name, or say --replace True "
            "to train it anew"
        )
    if existing and set(existing) == set(net.tasks):
        raise LoRKDError(f"replace: {', '.join(existing)} are all tasks of {source}; run `training` instead")
    images = data.counts()
    empty = [name for name in names if not images[name]["training"]]
    if empty:
        raise LoRKDError(f"new_tasks: task {empty[0]!r} has no training images in the data list {data.name!r}")
    return list(dict.fromkeys(names))


def _describe(net: LoRKDNet, tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the descriptions of the network's tasks into its info, in their order."""
    described = {name: {**tasks[name], "index": i} for i, name in enumerate(net.tasks) if name in tasks}
    net.info = {**net.info, "tasks": described}
