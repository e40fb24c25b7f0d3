"""Modules that exist once for each task: heads, and norms where each task has its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from lorkd_monai.networks.routing import RoutedModule, take_rows

__all__ = ["HeadBank", "TaskBank", "collect_features"]


class TaskBank(RoutedModule):
    """One module for each task; every row of a batch passes through its own task's module.

    Args:
        modules: the module of each task, in the order of the tasks.
        name: name of the replaced module in its network.
    """

    def __init__(self, modules: Sequence[nn.Module], name: str = "") -> None:
        super().__init__(len(modules), name)
        self.tasks = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        """Route each row to its task's module."""
        routing = self.routing(x)
        if routing.uniform is not None:
            return self._apply_one(routing.uniform, x)
        rows = x if routing.is_sorted else take_rows(x, routing.order)
        parts = [self._apply_one(t, rows[start:stop]) for t, start, stop in routing.sorted.segments]
        y = torch.cat(parts)
        return y if routing.is_sorted else take_rows(y, routing.inverse)

    def _apply_one(self, task: int, x: Tensor) -> Tensor:
        return self.tasks[task](x)

    def add(self, module: nn.Module) -> None:
        """Append the module of one more task."""
        self.tasks.append(module)
        self.num_tasks = len(self.tasks)

    def remove_expert(self, task: int) -> None:
        """Delete the module of one task; later tasks move up by one."""
        del self.tasks[task]
        self.num_tasks = len(self.tasks)

    def plain(self, task: int, memo: dict) -> nn.Module:
        """A copy of one task's module; tensors found in the deepcopy ``memo`` are shared instead."""
        return copy.deepcopy(self.tasks[task], dict(memo))

    def expert_tensors(self, task: int) -> dict[str, Tensor]:
        """Parameters and buffers of one task's module by name."""
        return self.tasks[task].state_dict(keep_vars=True)


class HeadBank(TaskBank):
    """The heads of all tasks. Channels past a row's own head are filled with -inf up to the widest head's count.

    Args:
        modules: the head of each task.
        num_classes: output channels of each head.
        channel_dim: dimension of the heads' output that holds the channels.
        name: name of the head in its network.
    """

    def __init__(
        self, modules: Sequence[nn.Module], num_classes: Sequence[int], channel_dim: int = 1, name: str = ""
    ) -> None:
        super().__init__(modules, name)
        self.num_classes = list(num_classes)
        self.channel_dim = channel_dim

    def forward(self, x: Tensor) -> Tensor:
        features = _FEATURES.get()
        if features is not None:
            spatial = [d for d in range(1, x.ndim) if d != self.channel_dim % x.ndim]
            features.append(x.mean(spatial) if spatial else x)
        return super().forward(x)

    def _apply_one(self, task: int, x: Tensor) -> Tensor:
        return pad_channels(self.tasks[task](x), self.channel_dim, max(self.num_classes))

    def add(self, module: nn.Module, num_classes: int = 0) -> None:
        super().add(module)
        self.num_classes.append(num_classes)

    def remove_expert(self, task: int) -> None:
        super().remove_expert(task)
        del self.num_classes[task]


def pad_channels(y: Tensor, dim: int, channels: int) -> Tensor:
    """``y`` with dimension ``dim`` filled up to ``channels`` with -inf."""
    missing = channels - y.shape[dim]
    if missing == 0:
        return y
    shape = list(y.shape)
    shape[dim] = missing
    return torch.cat([y, y.new_full(shape, float("-inf"))], dim)


_FEATURES: ContextVar[list[Tensor] | None] = ContextVar("lorkd_features", default=None)


@contextmanager
def collect_features() -> Iterator[list[Tensor]]:
    """Collect what the heads receive, pooled over space: one B × F tensor for each head that is called."""
    token = _FEATURES.set([])
    try:
        yield _FEATURES.get()
    finally:
        _FEATURES.reset(token)
