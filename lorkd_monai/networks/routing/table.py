"""Routing: which sample of a batch belongs to which task.

A network is written for plain batches; none of its code knows of tasks. The routing therefore does not travel through
the network's arguments: :func:`route` sets it for the calls made inside a ``with`` block, and every routed module
reads it there. It lives in a :class:`contextvars.ContextVar`, so two threads (or two asyncio tasks) that use one
network with different tasks never see each other's.

Two words name the parts of an ordered batch. A *round* is a repetition of the same sequence of tasks: 0 0 1 0 0 1 has
two. A *segment* is the rows of one task in a round. (A *group* is torch's word: a group of a grouped convolution.)
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorkd_monai.errors import LoRKDError

__all__ = ["Routing", "Segment", "current_routing", "route"]


class Segment(NamedTuple):
    """Rows ``start:stop`` of each round of a batch, all of one task."""

    task: int
    start: int
    stop: int


class Routing:
    """The task of every row of a batch.

    A batch is ordered if it consists of equal rounds, each sorted by task. A batch sorted by task is one round. With
    gcd(n_t) rounds the batch already has the layout that a grouped convolution needs, so nothing is copied.

    Args:
        tasks: task index of each row, in any order. One entry with ``size=None`` stands for a batch of any size.
        size: number of rows; a single task is repeated to it.
        ranks: rank to which the experts of a task are cut in this call, by the task's index; None: none is cut.

    Raises:
        LoRKDError: no task at all, a negative task, or a number of tasks that is neither 1 nor ``size``.
    """

    def __init__(self, tasks: Sequence[int], size: int | None = None, ranks: Mapping[int, int] | None = None) -> None:
        tasks = tuple(int(t) for t in tasks)
        if not tasks:
            raise LoRKDError("task is empty: expected one task for the batch, or one for each sample")
        if min(tasks) < 0:
            raise LoRKDError(f"task must not be negative, got {min(tasks)}")
        if size is not None and len(tasks) not in (1, size):
            raise LoRKDError(
                f"task has {len(tasks)} entries for a batch of {size} samples: give one for each sample, or one for all"
            )
        self.uniform = tasks[0] if len(set(tasks)) == 1 else None
        self.size = size if size is not None else (len(tasks) if len(tasks) > 1 else None)
        self.tasks = tasks * self.size if len(tasks) == 1 and self.size else tasks
        self.ranks = ranks
        self._expanded: dict[tuple[int, str], Routing] = {}

    @cached_property
    def present(self) -> tuple[int, ...]:
        """The tasks that occur, ascending."""
        return tuple(sorted(set(self.tasks)))

    @cached_property
    def rounds(self) -> int:
        """The number of rounds that the batch consists of; 0 where it is not ordered."""
        rounds = 1 + sum(a > b for a, b in zip(self.tasks, self.tasks[1:], strict=False))
        first = self.tasks[: len(self.tasks) // rounds]
        return rounds if first * rounds == self.tasks else 0

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Row numbers that bring the batch into as many rounds as can be; rows of one task keep their order."""
        rows = [[i for i, task in enumerate(self.tasks) if task == own] for own in self.present]
        rounds = math.gcd(*map(len, rows))
        parts = [(own, len(own) // rounds) for own in rows]
        return tuple(i for r in range(rounds) for own, size in parts for i in own[r * size : (r + 1) * size])

    @cached_property
    def inverse(self) -> tuple[int, ...]:
        """Row numbers that undo :attr:`order`."""
        inverse = [0] * len(self.order)
        for position, row in enumerate(self.order):
            inverse[row] = position
        return tuple(inverse)

    @cached_property
    def ordered(self) -> Routing:
        """The routing of the batch in :attr:`order`; this one where that changes nothing."""
        tasks = tuple(self.tasks[i] for i in self.order)
        return self if tasks == self.tasks else Routing(tasks, self.size, self.ranks)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """One segment for each task present. Only for an ordered routing of known size."""
        segments, start = [], 0
        for task in self.present:
            stop = start + self.tasks.count(task) // self.rounds
            segments.append(Segment(task, start, stop))
            start = stop
        return tuple(segments)

    def expand(self, rows: int, fold: str) -> Routing:
        """The routing of a tensor into which the network folded the batch.

        Args:
            rows: number of rows of that tensor, a multiple of the batch size.
            fold: ``"major"``: row r belongs to sample r // (rows / batch); ``"minor"``: to sample r % batch.
        """
        if rows == self.size:
            return self
        key = (rows, fold)
        if key not in self._expanded:
            times = rows // len(self.tasks)
            tasks = [t for t in self.tasks for _ in range(times)] if fold == "major" else self.tasks * times
            self._expanded[key] = Routing(tasks, rows, self.ranks)
        return self._expanded[key]


# What is told of every input that a routed module gets; used to find out how a network folds its batch.
_WATCH: ContextVar[Callable[[nn.Module, Tensor], None] | None] = ContextVar("lorkd_watch", default=None)
_ROUTING: ContextVar[Routing | None] = ContextVar("lorkd_routing", default=None)


def current_routing() -> Routing | None:
    """The routing in force, or None outside of :func:`route`."""
    return _ROUTING.get()


@contextmanager
def watch_inputs(watch: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """Tell ``watch`` of every routed module that is called inside the block, with its input."""
    token = _WATCH.set(watch)
    try:
        yield
    finally:
        _WATCH.reset(token)


@contextmanager
def route(task: int | Sequence[int] | Tensor | Routing, batch_size: int | None = None) -> Iterator[Routing]:
    """Set the routing that low-rank layers read, for the calls inside the block.

    Args:
        task: task index of each sample, in any order (LongTensor[B] or sequence), or one index for all of them.
        batch_size: B, the number of samples. May be left out where ``task`` names each sample, or where one task
            serves a batch of any size.

    Raises:
        LoRKDError: ``task`` is empty, negative, not integer, or of another length than ``batch_size``.

    Example::

        layer = LowRankLayer(nn.Conv2d(3, 8, 3), ranks=[4, 4], scale=2.0)
        with route([1, 0, 1], batch_size=3):
            y = layer(torch.rand(3, 3, 16, 16))
    """
    routing = task if isinstance(task, Routing) else Routing(task_list(task), batch_size)
    token = _ROUTING.set(routing)
    try:
        yield routing
    finally:
        _ROUTING.reset(token)


def task_list(task: Any) -> list[int]:
    """``task`` as a list of integers; refuses everything that is not a task index or a flat row of them."""
    if isinstance(task, Tensor):
        if task.dtype.is_floating_point or task.dtype.is_complex or task.dtype == torch.bool or task.ndim > 1:
            raise LoRKDError(
                f"task must be a LongTensor[B] of task indices, got {task.dtype} of shape {tuple(task.shape)}"
            )
        return task.reshape(-1).tolist()
    if isinstance(task, Iterable) and not isinstance(task, str):
        entries = list(task)
        wrong = [t for t in entries if not _is_index(t)]
        if wrong:
            raise LoRKDError(f"task must hold task indices (integers), got {wrong[0]!r}")
        return [operator.index(t) for t in entries]
    if not _is_index(task):
        raise LoRKDError(f"task must be a task index or one for each sample, got {task!r}")
    return [operator.index(task)]


def _is_index(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True
