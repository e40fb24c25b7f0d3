"""The spec of a decomposition: what its tasks and experts are, as plain JSON data that every checkpoint carries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorkd_monai.errors import LoRKDError

__all__ = ["SPEC_KEY", "checked_ranks", "checked_tasks", "differences", "read_spec", "write_spec"]

SPEC_KEY = "_extra_state"
"""Key of the spec in the state dict of a :class:`~lorkd_monai.networks.LoRKDNet`."""


def write_spec(spec: Mapping) -> Tensor:
    """The spec as bytes in a tensor, which any file format of weights can hold."""
    return torch.tensor(list(json.dumps(spec).encode()), dtype=torch.uint8)


def read_spec(extra_state: Tensor) -> dict:
    """The spec that a checkpoint carries under the key ``_extra_state``.

    Raises:
        LoRKDError: it is no spec.
    """
    try:
        return json.loads(bytes(extra_state.tolist()))
    except (AttributeError, TypeError, ValueError) as e:
        raise LoRKDError(f"the checkpoint does not say which decomposition it belongs to ({e})") from e


def differences(other: Mapping, own: Mapping) -> list[str]:
    """What differs between two specs, backbone and info aside; the order of the tasks counts."""
    return [
        f"{key}: checkpoint {other.get(key)}, this network {own[key]}"
        for key in own
        if key not in ("backbone", "info")
        and (other.get(key) != own[key] or _order(other.get(key)) != _order(own[key]))
    ]


def _order(value: object) -> list | None:
    return list(value) if isinstance(value, dict) else None


def checked_tasks(tasks: Mapping[str, int]) -> dict[str, int]:
    if not isinstance(tasks, Mapping) or not tasks:
        raise LoRKDError(f"tasks must map each task's name to its number of output channels, got {tasks!r}")
    for name, classes in tasks.items():
        if not isinstance(name, str) or not name:
            raise LoRKDError(f"tasks: a name must be a non-empty string, got {name!r}")
        if not isinstance(classes, int) or isinstance(classes, bool) or classes < 1:
            raise LoRKDError(f"tasks: {name!r} must have a number of output channels of at least 1, got {classes!r}")
    return dict(tasks)


def checked_ranks(rank: int | Mapping[str, int], tasks: Sequence[str]) -> dict[str, int]:
    ranks = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(tasks, rank)
    if set(ranks) != set(tasks):
        raise LoRKDError(f"rank names the tasks {', '.join(map(str, ranks))}; expected {', '.join(tasks)}")
    for name in tasks:
        if not isinstance(ranks[name], int) or isinstance(ranks[name], bool) or ranks[name] < 0:
            raise LoRKDError(f"rank of task {name!r} must be a whole number of at least 0, got {ranks[name]!r}")
    if len({r == 0 for r in ranks.values()}) > 1:
        raise LoRKDError(f"rank must be 0 for all tasks or for none, got {ranks}")
    return {name: ranks[name] for name in tasks}
