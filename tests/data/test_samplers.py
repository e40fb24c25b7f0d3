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


def test_items_of_no_task_are_never_drawn():
    tasks = [0, -1, 0, 1, -1, 1, 1, -1]
    assert sorted(draw.index for draw in TaskSampler(tasks, "natural")) == [0, 2, 3, 5, 6]
    plain = [t for t in tasks if t >= 0]
    places = [i for i, t in enumerate(tasks) if t >= 0]
    one, other = TaskSampler(tasks, seed=3), TaskSampler(plain, seed=3)
    assert len(one) == len(other) == 5
    assert [draw.seed for draw in one] == [draw.seed for draw in other]
    assert [draw.index for draw in one] == [places[draw.index] for draw in other]
    with pytest.raises(LoRKDError, match="nothing to sample"):
        TaskSampler([-1, -1])


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


def few_tasks(size, tasks_per_batch, tasks=TASKS, **options):
    return TaskBatchSampler(TaskSampler(tasks, **options), size, tasks_per_batch)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("tasks_per_batch", "size"), [(1, 12), (2, 12), (3, 12), (2, 11), (5, 12)])
def test_batches_of_few_tasks_are_full(tasks_per_batch, size, world_size):
    pieces = min(tasks_per_batch, 3)
    for epoch in range(3):
        numbers = set()
        for rank in range(world_size):
            sampler = few_tasks(
                size, tasks_per_batch, strategy="balanced", num_samples=300, rank=rank, world_size=world_size
            )
            sampler.set_epoch(epoch)
            batches = list(sampler)
            numbers.add(len(batches))
            assert len(batches) == len(sampler) == 300 // world_size // (size // pieces * pieces)
            for batch in batches:
                found = Counter(TASKS[draw.index] for draw in batch)
                assert len(found) == pieces and set(found.values()) == {size // pieces}
        assert len(numbers) == 1


def test_processes_share_the_batches_of_an_epoch():
    tasks = [0] * 60 + [1] * 60
    parts = [list(few_tasks(10, 2, tasks, num_samples=120, rank=r, world_size=2)) for r in range(2)]
    drawn = [draw.index for part in parts for batch in part for draw in batch]
    assert sorted(drawn) == list(range(120))


@pytest.mark.parametrize("tasks_per_batch", [1, 2])
@pytest.mark.parametrize(("strategy", "temperature"), [("natural", 1), ("temperature", 2), ("balanced", 1)])
def test_no_task_drowns_in_batches_of_few(strategy, temperature, tasks_per_batch):
    """Over the epochs each task has its share, also one that has less than a piece in an epoch."""
    sampler = few_tasks(16, tasks_per_batch, strategy=strategy, temperature=temperature, seed=1)
    found = Counter()
    for epoch in range(400):
        sampler.set_epoch(epoch)
        found.update(TASKS[draw.index] for batch in sampler for draw in batch)
    expected = draws_per_task([80, 16, 4], 100_000, sampler.sampler.temperature)
    assert sum(found.values()) == 400 * 96
    for task in range(3):
        assert found[task] / sum(found.values()) == pytest.approx(expected[task] / 100_000, abs=0.01)


def test_a_task_larger_than_all_others_fills_the_rest():
    for batch in few_tasks(8, 2, [0] * 900 + [1] * 4, strategy="natural"):
        assert len(batch) == 8 and sum(draw.index < 900 for draw in batch) >= 4


def test_images_come_in_rounds_in_batches_of_few_too():
    drawn = Counter(d.index for batch in few_tasks(30, 3, strategy="balanced", num_samples=300) for d in batch)
    assert [drawn[i] for i in range(96, 100)] == [25] * 4
    assert {drawn[i] for i in range(80)} == {1, 2}


def test_fewer_images_than_a_batch():
    sampler = few_tasks(64, 2, [0] * 5 + [1] * 5)
    assert len(sampler) == 1
    (batch,) = sampler
    assert Counter(draw.index // 5 for draw in batch) == {0: 5, 1: 5}


def test_one_task_alone_has_the_whole_batch():
    assert [len(batch) for batch in few_tasks(10, 4, [0] * 40)] == [10] * 4
    assert [len(batch) for batch in few_tasks(10, 4, [3] * 40)] == [10] * 4  # tasks without images are no tasks


def test_fixed_views_in_batches_of_few():
    sampler = few_tasks(10, 1, [0] * 20)
    sampler.sampler.views = 2
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs.append({draw.index: draw.seed for batch in sampler for draw in batch})
    assert epochs[0] == epochs[2] != epochs[1]


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
