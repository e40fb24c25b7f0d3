"""Task sampling: shares by hand, every image in turn, the same for the same seed and epoch, sharded without overlap."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from lorkd_monai.data import TaskBatchSampler, TaskSampler, draws_per_task
from lorkd_monai.errors import LoRKDError

TASKS = [0] * 80 + [1] * 16 + [2] * 4


def shares(sampler):
    return Counter(TASKS[draw[0]] for draw in sampler)


def test_draws_by_hand():
    assert draws_per_task([80, 16, 4], 100, 1) == [80, 16, 4]
    assert draws_per_task([81, 16, 9], 160, 2) == [90, 40, 30]  # roots 9, 4, 3
    assert draws_per_task([80, 16, 4], 99, float("inf")) == [33, 33, 33]
    assert draws_per_task([5, 0, 5], 10, float("inf")) == [5, 0, 5]
    assert sum(draws_per_task([7, 11, 13], 100, 3)) == 100


def test_natural_is_each_image_once():
    assert sorted(draw.index for draw in TaskSampler(TASKS, "natural")) == list(range(100))


def test_balanced_and_temperature_lift_small_tasks():
    assert set(shares(TaskSampler(TASKS, "balanced", num_samples=300)).values()) == {100}
    found = shares(TaskSampler(TASKS, "temperature", temperature=2))
    assert [found[t] for t in range(3)] == draws_per_task([80, 16, 4], 100, 2)
    assert found[0] > found[1] > found[2] > 4


def test_images_of_a_task_come_in_rounds():
    drawn = Counter(draw.index for draw in TaskSampler(TASKS, "balanced", num_samples=300))
    small = [drawn[i] for i in range(96, 100)]
    assert small == [25] * 4
    large = [drawn[i] for i in range(80)]
    assert set(large) == {1, 2}


def test_depends_on_seed_and_epoch_alone():
    first, second = TaskSampler(TASKS, seed=3), TaskSampler(TASKS, seed=3)
    list(first)
    first.set_epoch(4)
    second.set_epoch(4)
    assert list(first) == list(second)
    second.set_epoch(5)
    assert list(first) != list(second)
    assert list(TaskSampler(TASKS, seed=3)) != list(TaskSampler(TASKS, seed=4))


def test_seeds_differ_between_draws():
    assert len({draw.seed for draw in TaskSampler(TASKS)}) == 100
    assert all(isinstance(index, int) for index in TaskSampler(TASKS, seeds=False))


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_an_epoch(world_size):
    parts = [list(TaskSampler(TASKS, "natural", rank=r, world_size=world_size)) for r in range(world_size)]
    assert {len(part) for part in parts} == {-(-100 // world_size)}
    assert {draw.index for part in parts for draw in part} == set(range(100))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("tasks_per_batch", [1, 2, 3])
def test_batches_of_few_tasks(tasks_per_batch, world_size):
    batches = []
    for rank in range(world_size):
        sampler = TaskBatchSampler(TaskSampler(TASKS, "natural", rank=rank, world_size=world_size), 12, tasks_per_batch)
        own = list(sampler)
        assert len(own) == len(sampler)
        batches += own
    assert all(0 < len(batch) <= 12 for batch in batches)
    assert all(len({TASKS[draw.index] for draw in batch}) <= tasks_per_batch for batch in batches)
    assert {draw.index for batch in batches for draw in batch} == set(range(100))


def test_batches_follow_the_epoch():
    sampler = TaskBatchSampler(TaskSampler(TASKS), 8, 2)
    first = list(sampler)
    assert first == list(sampler)
    sampler.set_epoch(1)
    assert first != list(sampler)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "random"}, "strategy must be"),
        ({"temperature": 0.5}, "temperature must be at least 1"),
        ({"temperature": float("nan")}, "temperature must be at least 1"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"rank": 2, "world_size": 2}, "rank < world_size"),
        ({"seed": -1}, "seed >= 0"),
        ({"task_of_item": []}, "nothing to sample"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(LoRKDError, match=message):
        TaskSampler(**{"task_of_item": TASKS, **arguments})


def test_wrong_batches_are_refused():
    with pytest.raises(LoRKDError, match=r"tasks_per_batch must be in 1\.\.batch_size"):
        TaskBatchSampler(TaskSampler(np.array(TASKS)), 4, 5)
