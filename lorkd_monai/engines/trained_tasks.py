"""What a decomposition was trained to tell apart, against what a data list calls it now."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from lorkd_monai.bundle.export import work_of_info
from lorkd_monai.data import DataList
from lorkd_monai.data.identity import differences, task_identity
from lorkd_monai.errors import LoRKDError

__all__ = ["as_trained", "other_images"]


def as_trained(data: DataList, info: Mapping[str, Any], source: str, names: Iterable[str] | None = None) -> DataList:
    """The images of a data list under the tasks as a decomposition knows them, whose images are prepared as it learned.

    Intensity and spacing that a list does not state were measured on its images; the decomposition's own count then.

    Args:
        data: the data list.
        info: of the decomposition. Without tasks in it (it was made without a data list) the list stays as it is.
        source: what the decomposition is, for the message.
        names: tasks to compare; None: all that both have.

    Raises:
        LoRKDError: a task whose classes have other names or another order, or for which the list states other
            channels, another intensity or another spacing.
    """
    if "tasks" not in info:
        return data
    known = work_of_info(info).tasks
    differing = []
    for name in data.tasks if names is None else names:
        if name in known and name in data.tasks:
            compared = ("classes", *data.stated.get(name, ()))
            before, now = (task_identity(tasks[name], data.spatial_dims) for tasks in (known, data.tasks))
            lines = differences({k: before[k] for k in compared}, {k: now[k] for k in compared})
            differing += [f"{line} (task {name!r})" for line in lines]
    if differing:
        raise LoRKDError(
            f"the data list {data.name!r} does not mean what {source} was trained on: {'; '.join(differing)}. Give a "
            "list that names and prepares these tasks as then, or train on this one with another --output_dir"
        )
    return dataclasses.replace(data, tasks=known)


def other_images(digests: Mapping[str, str], info: Mapping[str, Any], split: str) -> bool:
    """Whether a split is known to be another one than that of the list that a decomposition was trained with.

    ``digests`` are `split_digests` of the list.
    """
    return info.get("images", {}).get(split, digests[split]) != digests[split]
