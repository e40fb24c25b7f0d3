"""The plain network of one task, kept as long as the weights stay what they are: serving at its price.

``net`` is a :class:`~lorkd_monai.networks.LoRKDNet`, which makes one of these for itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorkd_monai.networks.eks import costs
from lorkd_monai.networks.surgery.outputs import widen_classes

__all__ = ["PlainView"]


class PlainView:
    """The extracted network of one task, kept while the weights stay what they are.

    It shares all tensors with the decomposed network but the fused weights. It is used in evaluation mode without
    gradients, and made again when a parameter or buffer was changed in place or replaced.

    Some changes leave no trace in the tensors. Steps of fused optimisers are one kind: a call with gradients therefore
    clears the view, and none is made while a parameter holds a gradient. Changes through ``.data`` are the other: call
    :meth:`clear` after them (``net.train().eval()`` does).

    One view is kept, as a single reference: threads that serve different tasks replace it without disturbing each
    other.
    """

    def __init__(self, net: Any) -> None:
        self._net = net
        self._kept: _Kept | None = None

    def usable(self, task: int | None) -> bool:
        """True if a call may go through the view: one task, evaluation mode, no gradients, no forced strategy."""
        if torch.compiler.is_compiling():
            return False
        if torch.is_grad_enabled():
            self.clear()
            return False
        if task is None or self._net.training or costs.wanted() != "auto":
            return False
        return self._kept is not None or all(p.grad is None for p in self._net.backbone.parameters())

    def keeps(self, task: int) -> bool:
        """True where the network of ``task`` is there already."""
        kept = self._kept
        return kept is not None and kept.task == task

    def clear(self) -> None:
        """Forget the view."""
        self._kept = None

    def __call__(self, task: int, x: Tensor, kwargs: Mapping, widest: int | None) -> Any:
        """Run the view of ``task``; with class channels filled up to ``widest`` where that is given."""
        y = self.network(task)(x, **kwargs)
        classes = list(self._net.num_classes.values())[task]
        return y if widest is None or widest == classes else widen_classes(y, classes, widest)

    def network(self, task: int) -> nn.Module:
        """The plain network of ``task``, for the weights as they are now."""
        kept = self._kept
        if kept is None or kept.task != task or kept.state != _state(kept.slots):
            slots = self._slots(task)
            shared = {id(t): t for t in (*self._net.backbone.parameters(), *self._net.backbone.buffers())}
            state = _state(slots)  # before the weights are read: a change meanwhile is seen at the next call
            with torch.no_grad():
                kept = _Kept(task, slots, state, self._net._plain(task, shared))
            self._kept = kept
        return kept.network

    def _slots(self, task: int) -> list[tuple[dict, str]]:
        """Where the tensors of the network of ``task`` are: all but the other experts'."""
        others = {
            id(t)
            for other in range(len(self._net.tasks))
            if other != task
            for t in self._net.expert_tensors(other).values()
        }
        return [
            (tensors, name)
            for module in self._net.backbone.modules()
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if id(tensor) not in others
        ]

    def __deepcopy__(self, memo: dict) -> PlainView:
        return PlainView(copy.deepcopy(self._net, memo))

    def __getstate__(self) -> dict:
        return {"_net": self._net, "_kept": None}


class _Kept(NamedTuple):
    task: int
    slots: list[tuple[dict, str]]
    state: tuple
    network: nn.Module


def _state(slots: list[tuple[dict, str]]) -> tuple:
    """Which tensors are in ``slots``, and in which version."""
    tensors = [t for t in (d.get(name) for d, name in slots) if t is not None]
    return tuple((id(t), t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors)
