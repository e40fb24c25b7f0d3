"""Rows and class channels of what a network returns: a tensor, or a list, tuple, dict or dataclass of them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks.routing.rows import take_rows
from lorkd_monai.networks.routing.table import Routing
from lorkd_monai.networks.task_banks import pad_channels

__all__ = ["fill_classes", "map_classes", "narrow_classes", "select_rows", "widen_classes"]

Output = Any


def _map(function: Callable[[Tensor], Tensor], y: Output) -> Output:
    if isinstance(y, Tensor):
        return function(y)
    if type(y) is dict:
        return {k: _map(function, v) for k, v in y.items()}
    if isinstance(y, MutableMapping):  # such as the outputs of Hugging Face, whose items are attributes too
        new = copy.copy(y)
        for k, v in y.items():
            new[k] = _map(function, v)
        return new
    if isinstance(y, tuple) and hasattr(y, "_fields"):
        return type(y)(*(_map(function, v) for v in y))
    if isinstance(y, (list, tuple)):
        return type(y)([_map(function, v) for v in y])
    if dataclasses.is_dataclass(y):
        filled = copy.copy(y)
        for f in dataclasses.fields(y):
            object.__setattr__(filled, f.name, _map(function, getattr(y, f.name)))
        return filled
    if any(isinstance(v, Tensor) for v in getattr(y, "__dict__", {}).values()):
        raise LoRKDError(
            f"the network returns a {type(y).__name__} that holds tensors, and it is not known which row belongs to "
            "which sample: return a tensor, or a list, tuple, dict or dataclass of tensors"
        )
    return y


def map_classes(function: Callable[[Tensor, int], Tensor], y: Output, classes: int, image_dims: int = 0) -> Output:
    """``function(tensor, class dimension)`` over the class outputs in ``y``.

    The first tensor that is no single number (a loss) is one, and so are all of as many dimensions (deep supervision);
    others, such as the hidden states that a ViT returns beside its classes, stay as they are.

    Args:
        function: what to do.
        y: what a network returned.
        classes: number of class channels.
        image_dims: dimensions of the image batch. An output of one more holds several resolutions, stacked in dim 1.
    """
    first: list[int] = []

    def apply(t: Tensor) -> Tensor:
        if not first and t.ndim:
            first.append(t.ndim)
        return function(t, _class_dim(t, classes, image_dims)) if first and t.ndim == first[0] else t

    return _map(apply, y)


def _class_dim(y: Tensor, classes: int, image_dims: int) -> int:
    """The dimension that holds the class channels."""
    for dim in (2,) if y.ndim == image_dims + 1 else (1, 2, -1):
        if -y.ndim <= dim < y.ndim and y.shape[dim] == classes:
            return dim
    raise LoRKDError(
        f"the network's output of shape {tuple(y.shape)} has no dimension of {classes} class channels: its head is not "
        "the last layer that sets them. Name the head with head=…"
    )


def first_tensor(y: Output) -> Tensor:
    """The first tensor in ``y``: a network's main output.

    Raises:
        LoRKDError: there is none.
    """
    found: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        found.append(t)
        return t

    _map(note, y)
    if not found:
        raise LoRKDError(f"the network returned no tensor but a {type(y).__name__}")
    return found[0]


def first_rows(arguments: Mapping[str, object], batch: int, count: int) -> dict[str, object]:
    """Keyword arguments for the first ``count`` samples of a batch: tensors of one row a sample are cut."""
    return {
        k: v[:count] if isinstance(v, Tensor) and v.ndim and v.shape[0] == batch else v for k, v in arguments.items()
    }


def select_rows(y: Output, order: Sequence[int]) -> Output:
    """The rows of every tensor in ``y``, in the given order; numbers that stand for the whole batch stay.

    Raises:
        LoRKDError: a tensor has not one row for each sample.
    """

    def select(t: Tensor) -> Tensor:
        if t.ndim == 0:
            return t
        if t.shape[0] != len(order):
            raise LoRKDError(
                f"the network returns a tensor of shape {tuple(t.shape)} for a batch of {len(order)} samples, and it "
                "is not known which row belongs to which: give one task at a time"
            )
        return take_rows(t, order)

    return _map(select, y)


def fill_classes(y: Output, routing: Routing, num_classes: Sequence[int], image_dims: int) -> Output:
    """``y`` with -inf in the channels past each row's own head, whatever the layers after the head made of them."""
    widest = max(num_classes)

    def fill(t: Tensor, dim: int) -> Tensor:
        own = torch.tensor([num_classes[task] for task in routing.tasks], device=t.device)
        past = torch.arange(widest, device=t.device) >= own[:, None]
        if t.shape[0] != past.shape[0]:
            raise LoRKDError(
                f"the network's output of shape {tuple(t.shape)} has not one row for each of {past.shape[0]} samples"
            )
        shape = [1] * t.ndim
        shape[0], shape[dim] = past.shape
        return t.masked_fill(past.view(shape), float("-inf"))

    full = all(num_classes[task] == widest for task in routing.present)
    return map_classes((lambda t, dim: t) if full else fill, y, widest, image_dims)


def widen_classes(y: Output, own: int, widest: int, image_dims: int = 0) -> Output:
    """Class channels filled up from ``own`` to ``widest`` with -inf."""
    return map_classes(lambda t, dim: pad_channels(t, dim, widest), y, own, image_dims)


def narrow_classes(y: Output, widest: int, own: int, image_dims: int) -> Output:
    """The first ``own`` of ``widest`` class channels."""
    return map_classes(lambda t, dim: t.narrow(dim, 0, own), y, widest, image_dims)
