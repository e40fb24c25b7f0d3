"""Modules that exist once for each task: heads, and norms where each task has its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorkd_monai.networks.eks.vmapped_heads import can_run_together, run_together, slow_one_by_one
from lorkd_monai.networks.routing.module import RoutedModule
from lorkd_monai.networks.routing.rows import join_segments, segment_of_rows, take_rows, take_segment
from lorkd_monai.networks.routing.table import Routing
from lorkd_monai.networks.weight_facts import READABLE, readable

__all__ = ["HeadBank", "NormBank", "TaskBank", "watch_heads"]


class TaskBank(RoutedModule):
    """One module for each task; every row of a batch passes through its own task's module.

    Args:
        modules: the module of each task, in the order of the tasks.
        name: name of the replaced module in its network.
    """

    def __init__(self, modules: Sequence[nn.Module], name: str = "") -> None:
        super().__init__(len(modules), name)
        self.tasks = nn.ModuleList(modules)

    @torch.compiler.disable  # as in LowRankLayer
    def forward(self, x: Tensor) -> Tensor:
        """Route each row to its task's module."""
        routing = self.routing(x)
        if routing.uniform is not None:
            return self._apply_one(routing.uniform, x)
        if routing.rounds:
            return self._apply_ordered(x, routing)
        return take_rows(self._apply_ordered(take_rows(x, routing.order), routing.ordered), routing.inverse)

    def _apply_ordered(self, x: Tensor, routing: Routing) -> Tensor:
        rounds = routing.rounds
        parts = [self._apply_one(t, take_segment(x, start, stop, rounds)) for t, start, stop in routing.segments]
        return join_segments(parts, rounds)

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


class NormBank(TaskBank):
    """Norms of all tasks (``norm="task"``): each task's rows are normalised by its own statistics and parameters.

    In training, a batch norm whose task has a single value per channel in the batch takes its running statistics, as
    one value has no variance; which batches hold such a task is chance.
    """

    def _apply_one(self, task: int, x: Tensor) -> Tensor:
        norm = self.tasks[task]
        single = x.numel() == x.shape[1] and norm.training
        if single and isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
            return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
        return norm(x)


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

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        calls = _HEAD_CALLS.get()
        if calls is not None:
            calls.append((self, x))
        return super().forward(x)

    def _apply_ordered(self, x: Tensor, routing: Routing) -> Tensor:
        heads = [self.tasks[t] for t in routing.present]
        if not (slow_one_by_one(x, routing) and can_run_together(heads)):
            return super()._apply_ordered(x, routing)
        segment_of_row = segment_of_rows(((start, stop) for _, start, stop in routing.segments), routing.rounds)
        return pad_channels(run_together(heads, x, segment_of_row), self.channel_dim, max(self.num_classes))

    def _apply_one(self, task: int, x: Tensor) -> Tensor:
        return pad_channels(self.tasks[task](x), self.channel_dim, max(self.num_classes))

    def add(self, module: nn.Module, num_classes: int = 0) -> None:
        super().add(module)
        self.num_classes.append(num_classes)

    def remove_expert(self, task: int) -> None:
        super().remove_expert(task)
        del self.num_classes[task]

    def __getattr__(self, item: str) -> Any:
        if item in READABLE:
            refusal = (
                f"{self._who()}: the network computes with its {item} by itself, past the head, and each task has its "
                "own: name another head with head=…"
            )
            widest = self.num_classes.index(max(self.num_classes))  # as wide as what the heads give together
            return readable(self.tasks[widest], item, refusal)
        return super().__getattr__(item)


def pad_channels(y: Tensor, dim: int, channels: int) -> Tensor:
    """``y`` with dimension ``dim`` filled up to ``channels`` with -inf."""
    missing = channels - y.shape[dim]
    if missing == 0:
        return y
    shape = list(y.shape)
    shape[dim] = missing
    return torch.cat([y, y.new_full(shape, float("-inf"))], dim)


_HEAD_CALLS: ContextVar[list[tuple[HeadBank, Tensor]] | None] = ContextVar("lorkd_head_calls", default=None)


@contextmanager
def watch_heads() -> Iterator[list[tuple[HeadBank, Tensor]]]:
    """Note which heads are called inside the block, and with what."""
    calls: list[tuple[HeadBank, Tensor]] = []
    token = _HEAD_CALLS.set(calls)
    try:
        yield calls
    finally:
        _HEAD_CALLS.reset(token)
