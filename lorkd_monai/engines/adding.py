"""New tasks for a decomposition that is already in use: everything it holds stays as it is."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

from torch import nn

from lorkd_monai.bundle.export import tasks_of_info
from lorkd_monai.data import DataList
from lorkd_monai.data.checks import SPLITS
from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import LoRKDNet
from lorkd_monai.networks.checkpoint import load_decomposition

__all__ = ["network_with_new_tasks", "new_tasks_of"]


def network_with_new_tasks(
    checkpoint: str | os.PathLike,
    data: DataList,
    rank: int | Mapping[str, int] | None = None,
    in_channels: int | None = None,
    image_size: int | Sequence[int] | None = None,
) -> LoRKDNet:
    """A trained decomposition with a fresh expert and head for each task of a data list that it does not know yet.

    Only the new experts, heads and task norms can be trained: the outputs of the earlier tasks stay as they are, to
    the last bit.

    Args:
        checkpoint: of the decomposition.
        data: the data list; its tasks that the decomposition knows already are left alone.
        rank: of the new experts, one for all or one for each; None: that of the first task.
        in_channels: channels of the images to train on, which must be those of the decomposition.
        image_size: size of the images to train on, which must be that of the decomposition.

    Raises:
        LoRKDError: no new task, or another kind of work, channels or image size than the decomposition's.
    """
    net = load_decomposition(checkpoint)
    tasks_of_info(net.info)  # raises where the checkpoint does not describe its tasks
    new = [name for name in data.tasks if name not in net.tasks]
    if not new:
        raise LoRKDError(
            f"nothing to add: the decomposition {checkpoint} knows all tasks of {data.name!r} already "
            f"({', '.join(data.tasks)}); name a new task otherwise, or remove the old one first"
        )
    wanted = {"kind": data.kind, "spatial_dims": data.spatial_dims, "in_channels": in_channels}
    wanted["image_size"] = list(image_size) if isinstance(image_size, (list, tuple)) else image_size
    for key, value in wanted.items():
        if value is not None and net.info.get(key, value) != value:
            raise LoRKDError(f"{key} is {value!r}, but the decomposition {checkpoint} was made for {net.info[key]!r}")
    for name in new:
        own = rank.get(name) if isinstance(rank, Mapping) else rank
        net.add_task(name, data.tasks[name].num_classes, own, freeze=True)
    for name in new:  # each call froze what the ones before it had added
        for tensor in net.expert_tensors(net.tasks.index(name)).values():
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(True)
    described = {
        name: dataclasses.asdict(dataclasses.replace(data.tasks[name], index=net.tasks.index(name))) for name in new
    }
    net.info = {**net.info, "tasks": {**net.info["tasks"], **described}}
    return net


def new_tasks_of(data: DataList, net: LoRKDNet) -> DataList:
    """All tasks of ``net``, with the images of those that are new in it: what `adding` trains and measures on.

    New are the tasks whose experts can be trained (see :func:`network_with_new_tasks`).

    Args:
        data: the data list that brought the new tasks.
        net: as :func:`network_with_new_tasks` gives it.
    """
    trainable = {
        name
        for index, name in enumerate(net.tasks)
        if any(tensor.requires_grad for tensor in net.expert_tensors(index).values())
    }
    items = {split: [item for item in data.split(split) if item["task"] in trainable] for split in SPLITS}
    return dataclasses.replace(data, tasks=tasks_of_info(net.info), **items)
