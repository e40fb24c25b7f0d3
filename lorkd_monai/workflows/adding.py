"""New tasks for a decomposition that is already in use: everything it holds stays as it is."""

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
    check_inert_config,
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
    """What a checkpoint of `training` says of the images that it is for: kind, image_size, in_channels, ….

    Raises:
        LoRKDError: there is no such checkpoint, or it does not say that.
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
    """A trained decomposition with a fresh expert and head for each new task of a data list.

    Only the new experts, heads and task norms can be trained: the outputs of the other tasks stay as they are, to the
    last bit. New tasks stand behind the earlier ones, replaced ones too.

    Args:
        checkpoint: of the decomposition.
        data: the data list; its tasks that are not added are left alone.
        rank: of the new experts, one for all or one for each; None: that of the first task, or of the one replaced.
        in_channels: channels of the images to train on, which must be those of the decomposition.
        image_size: size of the images to train on, which must be that of the decomposition.
        new_tasks: which tasks of the data list to add; None: all that the decomposition does not have.
        replace: tasks of ``new_tasks`` that exist start anew.
        backbone: config of the backbone, used where the checkpoint's own is no network of MONAI's.

    Raises:
        LoRKDError: no checkpoint, no new task, one that exists or is not in the data list, one whose old classes
            differ, or another kind of work, channels or image size than the decomposition's.
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
    """A decomposition without one of its tasks; all others answer as before, to the last bit.

    Raises:
        LoRKDError: no such checkpoint or task, or the last task.
    """
    net = load_decomposition(checkpoint, backbone)
    net.remove_task(task)
    if "tasks" in net.info:
        _describe(net, net.info["tasks"])
    return net


def new_tasks_of(data: DataList, net: LoRKDNet) -> DataList:
    """All tasks of ``net``, with the images that `adding` works on.

    Those of training and validation belong to the new tasks, whose experts can be trained (see
    :func:`network_with_new_tasks`); those to test to all tasks that the list and the network share.

    Args:
        data: the data list that brought the new tasks.
        net: as :func:`network_with_new_tasks` gives it.

    Raises:
        LoRKDError: a task of both that is another one in the list, see `as_trained`.
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
    """What must be the same for an interrupted run to go on: the shared weights, the new tasks and their ranks."""
    ranks = net.spec()["rank"]
    return {"shared_weights": fingerprint(net), "new_tasks": {name: ranks[name] for name in added_tasks(net)}}


def _needed(backbone: Mapping[str, Any] | None, spec: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """``backbone`` where a checkpoint has no config of its own, or one that may not be built."""
    if spec.get("backbone") is None:
        return backbone
    try:
        check_inert_config(spec["backbone"], "")
    except LoRKDError:
        return backbone
    return None


def _checked_names(net: LoRKDNet, data: DataList, names: Any, replace: bool, source: str) -> list[str]:
    if names is None:
        if replace:
            raise LoRKDError("replace: name the tasks that are to start anew with --new_tasks")
        names = [name for name in data.tasks if name not in net.tasks]
        if not names:
            raise LoRKDError(
                f"nothing to add: the decomposition {source} knows all tasks of {data.name!r} already "
                f"({', '.join(data.tasks)}). Name a new task otherwise, or train one anew: --new_tasks \"['NAME']\" "
                "--replace True"
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
            f"task {existing[0]!r} exists already in {source}: name the new one otherwise, or say --replace True to "
            "train it anew"
        )
    if existing and set(existing) == set(net.tasks):
        raise LoRKDError(f"replace: {', '.join(existing)} are all tasks of {source}; run `training` in place of it")
    images = data.counts()
    empty = [name for name in names if not images[name]["training"]]
    if empty:
        raise LoRKDError(f"new_tasks: task {empty[0]!r} has no training images in the data list {data.name!r}")
    return list(dict.fromkeys(names))


def _describe(net: LoRKDNet, tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the descriptions of the network's tasks into its info, in order."""
    described = {name: {**tasks[name], "index": i} for i, name in enumerate(net.tasks) if name in tasks}
    net.info = {**net.info, "tasks": described}
