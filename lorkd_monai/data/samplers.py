"""Drawing samples of many tasks, with a fair part for small tasks; the same in every process and after a resume."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from lorkd_monai.errors import LoRKDError

__all__ = ["Draw", "TaskBatchSampler", "TaskSampler", "draws_per_task"]


class Draw(NamedTuple):
    """One draw of an epoch: which item, and the seed of its random transforms."""

    index: int  # type: ignore[assignment]  # a tuple's own is not used
    seed: int


def draws_per_task(counts: Sequence[int], total: int, temperature: float) -> list[int]:
    """Return how many of ``total`` draws each task gets: p_t ∝ n_t^(1/T), rounded by largest remainder.

    Args:
        counts: n_t, the number of images of each task; a task with none gets no draws.
        total: draws of one epoch, all tasks together.
        temperature: T ≥ 1. 1 keeps the natural shares, infinity gives each task the same.
    """
    weights = np.array([n ** (1.0 / temperature) if n else 0.0 for n in counts])
    shares = total * weights / weights.sum()
    draws = np.floor(shares).astype(int)
    rest = np.argsort(-(shares - draws), kind="stable")[: total - draws.sum()]
    draws[rest] += 1
    return draws.tolist()


class TaskSampler(Sampler):
    """Draw one epoch of samples over all tasks, a function of (seed, epoch) alone.

    A task's images are drawn in shuffled rounds: each is seen once before any is seen again. Call `set_epoch` before
    each epoch. The draws do not depend on earlier draws, so a resumed run draws the same as one without a break.

    Args:
        task_of_item: task index of each item of the data set; an item of -1 is never drawn.
        strategy: ``"natural"`` (each image once), ``"balanced"`` (each task as often), or ``"temperature"``
            (p_t ∝ n_t^(1/T)).
        temperature: T of ``"temperature"``, at least 1.
        num_samples: draws of one epoch over all processes; None for the number of items.
        seed: any whole number of at least 0.
        rank: number of this process.
        world_size: number of processes; each gets as many draws (the last are drawn again where it does not divide).
        seeds: yield `Draw` tuples, for data sets with random crops, in place of plain indices.

    Attributes:
        views: in how many fixed ways each image is shown, one after the other from epoch to epoch: its `Draw` seed is
            then a function of the image and of ``epoch % views``. None: each draw has a seed of its own.

    Raises:
        LoRKDError: for an argument that does not fit.

    Example::

        sampler = TaskSampler(dataset.task_of_item, "temperature", temperature=2.0, seed=0)
        loader = DataLoader(dataset, batch_size=32, sampler=sampler)
    """

    def __init__(
        self,
        task_of_item: Sequence[int],
        strategy: str = "temperature",
        temperature: float = 2.0,
        num_samples: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        seeds: bool = True,
    ) -> None:
        if strategy not in ("natural", "balanced", "temperature"):
            raise LoRKDError(f"strategy must be 'natural', 'balanced' or 'temperature', got {strategy!r}.")
        if not temperature >= 1:
            raise LoRKDError(f"temperature must be at least 1, got {temperature!r}.")
        tasks = np.asarray(task_of_item)
        if not (tasks >= 0).any():
            raise LoRKDError("there is nothing to sample: the data set has no items.")
        if num_samples is not None and num_samples < 1:
            raise LoRKDError(f"num_samples must be at least 1, or None for one draw per item, got {num_samples!r}.")
        if seed < 0 or not 0 <= rank < world_size:
            raise LoRKDError(f"expected seed >= 0 and 0 <= rank < world_size, got {seed}, {rank} and {world_size}.")
        self.items_of_task = [np.flatnonzero(tasks == t) for t in range(int(tasks.max()) + 1)]
        self.temperature = {"natural": 1.0, "balanced": math.inf, "temperature": float(temperature)}[strategy]
        self.num_samples = int((tasks >= 0).sum()) if num_samples is None else int(num_samples)
        self.seed, self.epoch, self.rank, self.world_size, self.seeds = int(seed), 0, rank, world_size, seeds
        self.views: int | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (0, 1, …) whose draws come next."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return -(-self.num_samples // self.world_size)

    def __iter__(self) -> Iterator[Draw] | Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = np.concatenate(self.draw(rng, draws_per_task(self.counts, self.num_samples, self.temperature)))
        order = order[rng.permutation(len(order))]
        order = np.resize(order, len(self) * self.world_size)  # np.resize starts again from the front
        yield from self.with_seeds(order, rng)[self.rank :: self.world_size]

    @property
    def counts(self) -> list[int]:
        """Number of items of each task."""
        return [len(items) for items in self.items_of_task]

    def draw(self, rng: np.random.Generator, counts: Sequence[int]) -> list[np.ndarray]:
        """Return the items that each task gives to one epoch, so many of each task, in shuffled rounds."""
        drawn = []
        for items, count in zip(self.items_of_task, counts, strict=True):
            rounds = -(-count // len(items)) if len(items) else 0
            shuffled = [rng.permutation(items) for _ in range(rounds)]
            drawn.append(np.concatenate(shuffled)[:count] if shuffled else np.empty(0, dtype=np.int64))
        return drawn

    def with_seeds(self, order: np.ndarray, rng: np.random.Generator) -> list[Draw] | list[int]:
        """Return the indices with a seed each, or as plain integers."""
        if not self.seeds:
            return [int(i) for i in order]
        if self.views is not None:
            view = self.epoch % self.views
            return [Draw(int(i), int(np.random.default_rng([self.seed, i, view]).integers(2**31))) for i in order]
        return [Draw(int(i), int(s)) for i, s in zip(order, rng.integers(2**31, size=len(order)), strict=True)]


class TaskBatchSampler(Sampler):
    """Make batches of few tasks: ``tasks_per_batch`` pieces of ``batch_size // tasks_per_batch`` samples of one task.

    A norm, and the gradient of an expert, then see enough images of a task at once, and routing has fewer
    segments. All pieces are full, so that no sample weighs more than another in a mean over its batch, the losses' and
    the norms' (the objective averages over samples), and no incomplete piece of a task makes a step. For this,
    tasks share whole pieces in place of draws: in each epoch each gets its share (see `TaskSampler`) rounded down
    or up at random, so that over the epochs the shares are exact, also where a task has less than one piece an epoch.
    An epoch has as many batches as one of mixed batches with the last left out.

    The tasks of a batch differ, unless one task has more pieces than the epoch has batches. Where there are
    fewer tasks than ``tasks_per_batch``, a batch holds all of them. Everything is a function of (seed, epoch).

    Args:
        sampler: gives the draws, the rank and the world size; each process gets as many batches.
        batch_size: most samples in a batch; fewer where ``tasks_per_batch`` does not divide it.
        tasks_per_batch: most tasks in a batch.

    Attributes:
        batch_size: samples in each batch.

    Raises:
        LoRKDError: where ``tasks_per_batch`` is not in 1..``batch_size``.

    Example::

        batches = TaskBatchSampler(TaskSampler(dataset.task_of_item), batch_size=64, tasks_per_batch=4)
        loader = DataLoader(dataset, batch_sampler=batches)  # 16 images of each of 4 tasks
    """

    def __init__(self, sampler: TaskSampler, batch_size: int, tasks_per_batch: int) -> None:
        if not 1 <= tasks_per_batch <= batch_size:
            raise LoRKDError(f"tasks_per_batch must be in 1..batch_size ({batch_size}), got {tasks_per_batch!r}.")
        self.sampler = sampler
        self._pieces = min(tasks_per_batch, sum(count > 0 for count in sampler.counts))
        self._piece = max(1, min(batch_size, len(sampler)) // self._pieces)
        self.batch_size = self._pieces * self._piece

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (0, 1, …) whose batches come next."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return max(1, len(self.sampler) // self.batch_size)

    def __iter__(self) -> Iterator[list[Draw]] | Iterator[list[int]]:
        sampler = self.sampler
        rng = np.random.default_rng([sampler.seed, sampler.epoch])
        batches = len(self) * sampler.world_size
        weights = np.array([n ** (1.0 / sampler.temperature) if n else 0.0 for n in sampler.counts])
        left = _share_out(weights, batches * self._pieces, rng)
        drawn = sampler.draw(rng, (left * self._piece).tolist())
        pieces = [iter(rng.permutation(own).reshape(-1, self._piece)) for own in drawn]
        for number in range(batches):
            # A task with a piece for each batch to come gets one into this batch, so the rest always fit.
            chosen = _share_out(left, self._pieces, rng)
            left -= chosen
            items = [next(pieces[task]) for task in np.repeat(np.arange(len(chosen)), chosen)]
            draws = sampler.with_seeds(np.concatenate(items), rng)
            if number % sampler.world_size == sampler.rank:
                yield draws


def _share_out(weights: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
    """Return whole numbers that add up to ``total``: each is its share rounded down or up, on average the share itself.

    This is systematic sampling: the shares are laid end to end in random order, and cut at steps of 1.
    """
    order = rng.permutation(np.flatnonzero(weights))
    ends = np.cumsum(weights[order]) * total / weights.sum()
    ends[-1] = total
    # A coarse random start keeps ends and cuts apart by far more than rounding moves them.
    marks = np.floor(ends + rng.integers(2**20) / 2**20)
    numbers = np.zeros(len(weights), dtype=np.int64)
    numbers[order] = np.diff(marks, prepend=0.0)
    return numbers
