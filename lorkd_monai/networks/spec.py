"""The spec of a decomposition: what its tasks and experts are, as plain JSON data that every checkpoint carries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorkd_monai.checks import check_whole, is_whole
from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks.eks.strategies import LAYOUTS

__all__ = [
    "SPEC_KEY",
    "checked_options",
    "checked_ranks",
    "checked_tasks",
    "cut_rank",
    "cut_ranks",
    "differences",
    "draw_ranks",
    "layer_rank",
    "misfits",
    "read_spec",
    "write_spec",
]

NORMS = ("shared", "task")

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
        if not is_whole(classes):
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


def checked_options(
    alpha: object,
    scale: object,
    layout: str,
    head: str | Sequence[str] | None,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    rank_pattern: Mapping[str, float] | None,
    norm: str,
    nested: bool,
) -> dict:
    """The options of a decomposition as plain data; ``nested`` is only there where it is set, as it came later."""
    if layout not in LAYOUTS:
        raise LoRKDError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    if norm not in NORMS:
        raise LoRKDError(f"norm must be one of {NORMS}, got {norm!r}")
    if not isinstance(alpha, (int, float)) or not (scale is None or isinstance(scale, (int, float))):
        raise LoRKDError(f"alpha and scale must be numbers, got alpha={alpha!r}, scale={scale!r}")
    if not isinstance(nested, bool):
        raise LoRKDError(f"nested must be True or False, got {nested!r}")
    return {
        "alpha": float(alpha),
        "scale": None if scale is None else float(scale),
        "layout": layout,
        "head": head if head is None or isinstance(head, str) else list(head),
        "include": None if include is None else list(include),
        "exclude": None if exclude is None else list(exclude),
        "rank_pattern": dict(rank_pattern or {}),
        "norm": norm,
        **({"nested": True} if nested else {}),
    }


def misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Why ``state`` does not fit the tensors ``own``: at most four names of each kind. A spec may have another size."""
    keys = {"missing": [k for k in own if k not in state], "unknown": [k for k in state if k not in own]}
    shapes = [k for k in own if k in state and k != SPEC_KEY and state[k].shape != own[k].shape]
    return [
        f"{len(found)} {what} ({', '.join(found[:4])}{', …' if len(found) > 4 else ''})"
        for what, found in keys.items()
        if found
    ] + [f"{k} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)}" for k in shapes[:4]]


def layer_rank(rank: int, factor: float) -> int:
    """Rank of a layer's expert, of a task's rank and the factor that ``rank_pattern`` gives the layer."""
    return max(1, round(rank * factor))


def draw_ranks(ranks: list[int]) -> dict[int, int]:
    """One rank for each task, even from 1 to its own, from torch's random generator on the CPU."""
    return {t: 1 + int(u * r) for t, (u, r) in enumerate(zip(torch.rand(len(ranks)).tolist(), ranks, strict=True))}


def cut_rank(net: Any, task: str | int, rank: int) -> int:
    """The rank that a task's expert has when it is cut to at most ``rank``.

    Args:
        net: a :class:`~lorkd_monai.networks.LoRKDNet`.
        task: name or index.
        rank: at least 1.

    Raises:
        LoRKDError: ``rank`` is no whole number of at least 1, or less than the expert's own in a decomposition that was
            not trained for it.
    """
    name = net.tasks[net.task_index(task)]
    own = net.spec()["rank"][name]
    check_whole("rank", rank)
    if rank < own and not net.nested:
        raise LoRKDError(
            f"task {name!r} can't be cut from rank {own} to {rank}: the first components of its expert work alone only "
            "where the decomposition was trained with nested=True (--nested True)"
        )
    return min(rank, own)


def cut_ranks(net: Any, rank: int | Mapping[str, int]) -> dict[int, int]:
    """:func:`cut_rank` of every task that ``rank`` names, or of all, by the task's index."""
    given = rank.items() if isinstance(rank, Mapping) else [(task, rank) for task in net.tasks]
    return {net.task_index(task): cut_rank(net, task, k) for task, k in given}
