"""Routing: any order of tasks, every wrong task named, and no mixing between threads."""

from __future__ import annotations

import asyncio
import math
import random
import threading

import numpy as np
import pytest
import torch
from torch import nn

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import LowRankLayer, Routing, current_routing, route
from tests.networks.reference import assert_close, reference


def test_tasks_in_any_order():
    routing = Routing([2, 0, 2, 1])
    assert (routing.size, routing.uniform, routing.present, routing.rounds) == (4, None, (0, 1, 2), 0)
    assert routing.order == (1, 3, 0, 2)  # rows of one task keep their order
    assert [routing.order[i] for i in routing.inverse] == [0, 1, 2, 3]
    assert routing.ordered.tasks == (0, 1, 2, 2)
    assert [tuple(s) for s in routing.ordered.segments] == [(0, 0, 1), (1, 1, 2), (2, 2, 4)]
    assert routing.ordered.ordered is routing.ordered


@pytest.mark.parametrize(
    ("tasks", "rounds", "order", "segments"),
    [
        ([0, 0, 1, 1], 1, (0, 2, 1, 3), [(0, 0, 1), (1, 1, 2)]),
        ([0, 1, 0, 1], 2, (0, 1, 2, 3), [(0, 0, 1), (1, 1, 2)]),
        ([0, 0, 1, 0, 0, 1], 2, (0, 1, 2, 3, 4, 5), [(0, 0, 2), (1, 2, 3)]),
        ([3, 5, 3, 3, 5, 3], 0, (0, 2, 1, 3, 5, 4), [(3, 0, 2), (5, 2, 3)]),
        ([0, 1, 0, 1, 1], 0, (0, 2, 1, 3, 4), [(0, 0, 2), (1, 2, 5)]),
    ],
)
def test_rounds(tasks, rounds, order, segments):
    routing = Routing(tasks)
    assert (routing.rounds, routing.order) == (rounds, order)
    assert [tuple(s) for s in routing.ordered.segments] == segments
    assert (routing.ordered is routing) == (order == tuple(range(len(tasks))))


@pytest.mark.parametrize("fold", ["major", "minor"])
def test_folding_keeps_an_ordered_batch_ordered(fold):
    assert Routing([0, 0, 1, 0, 0, 1]).expand(18, fold).rounds == {"major": 2, "minor": 6}[fold]


@pytest.mark.parametrize("seed", range(20))
def test_random_orders_undo_each_other(seed):
    draw = random.Random(seed)
    tasks = [draw.randrange(4) for _ in range(draw.randrange(2, 12))]
    routing = Routing(tasks)
    rows = [tasks[i] for i in routing.order]
    assert sorted(routing.order) == list(range(len(tasks))) and [rows[i] for i in routing.inverse] == tasks
    assert routing.uniform is not None or routing.ordered.rounds == math.gcd(*map(tasks.count, set(tasks)))


def test_uniform_batches():
    assert Routing([3]).size is None and Routing([3]).uniform == 3
    assert Routing([3], 4).tasks == (3, 3, 3, 3)
    assert Routing([1, 1, 1]).uniform == 1
    assert Routing([1], 1).size == 1


def test_folded_batches():
    routing = Routing([1, 0])
    assert routing.expand(6, "major").tasks == (1, 1, 1, 0, 0, 0)
    assert routing.expand(6, "minor").tasks == (1, 0, 1, 0, 1, 0)
    assert routing.expand(2, "rows") is routing
    assert routing.expand(6, "minor") is routing.expand(6, "minor")


@pytest.mark.parametrize(
    ("task", "size", "message"),
    [
        ([], None, "task is empty"),
        (torch.tensor([], dtype=torch.long), 0, "task is empty"),
        ([0, -1], None, "must not be negative, got -1"),
        ([0, 1], 3, "2 entries for a batch of 3"),
        ([0, 1, 0], 1, "3 entries for a batch of 1"),
        (torch.tensor([0.0, 1.0]), 2, r"LongTensor\[B\].*float32"),
        (torch.tensor([True, False]), 2, r"LongTensor\[B\].*bool"),
        (torch.tensor([[0], [1]]), 2, r"shape \(2, 1\)"),
        ("spleen", 2, "must be a task index or one for each sample, got 'spleen'"),
        (1.0, 2, "must be a task index"),
        (True, 2, "must be a task index"),
        ([0, 1.5], 2, "must hold task indices"),
        ([0, torch.tensor(1.5)], 2, "must hold task indices"),
        (np.array([0.0, 1.0]), 2, "must hold task indices"),
        (None, 2, "must be a task index"),
        ([0, "a"], 2, "must hold task indices"),
        ([[0], [1]], 2, "must hold task indices"),
    ],
)
def test_wrong_tasks(task, size, message):
    with pytest.raises(LoRKDError, match=message), route(task, batch_size=size):
        pytest.fail("entered")
    assert current_routing() is None


@pytest.mark.parametrize(
    "task",
    [
        [1, 0],
        (1, 0),
        torch.tensor([1, 0]),
        torch.tensor([1, 0], dtype=torch.int32),
        torch.tensor([1, 0], dtype=torch.uint8),
        np.array([1, 0]),
        [np.int64(1), torch.tensor(0)],
        range(1, -1, -1),
    ],
)
def test_forms_of_task(task):
    with route(task, batch_size=2) as routing:
        assert current_routing() is routing and routing.tasks == (1, 0)


@pytest.mark.parametrize("task", [1, torch.tensor(1), torch.tensor([1]), [1], np.int64(1)])
def test_one_task_for_all(task):
    with route(task, batch_size=3) as routing:
        assert routing.tasks == (1, 1, 1)


def test_blocks_nest_and_end():
    with route(0):
        with route(1):
            assert current_routing().uniform == 1
        assert current_routing().uniform == 0
        with pytest.raises(RuntimeError, match="boom"), route(2):
            raise RuntimeError("boom")
        assert current_routing().uniform == 0
    assert current_routing() is None


def layers():
    plain = nn.Conv2d(2, 3, 3, padding=1).double()
    wrapped = LowRankLayer(nn.Conv2d(2, 3, 3, padding=1).double(), [2, 2, 2, 2], 1.0)
    wrapped.layer.load_state_dict(plain.state_dict())
    for b in wrapped.lora_B:
        nn.init.normal_(b)
    return plain, wrapped


def test_threads_do_not_mix():
    plain, wrapped = layers()
    x = torch.rand(4, 2, 5, 5).double()
    tasks = [[0, 0, 0, 0], [3, 1, 2, 0], [1, 1, 1, 1], [0, 2, 2, 1]]
    expected = [reference(plain, x, t, wrapped.lora_A, wrapped.lora_B, [1.0] * 4).detach() for t in tasks]
    barrier, failures = threading.Barrier(len(tasks)), []

    def work(i):
        try:
            for _ in range(150):
                with route(tasks[i], batch_size=4):
                    barrier.wait(timeout=60)  # all threads have set their routing before any layer reads it
                    y = wrapped(x)
                assert_close(y, expected[i])
        except BaseException as e:  # told by the main thread
            failures.append(e)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_asyncio_tasks_do_not_mix():
    plain, wrapped = layers()
    x = torch.rand(1, 2, 5, 5).double()

    async def serve(task):
        with route(task, batch_size=1):
            await asyncio.sleep(0)
            return wrapped(x)

    async def both():
        return await asyncio.gather(*(serve(t) for t in range(4)))

    for task, y in enumerate(asyncio.run(both())):
        assert_close(y, reference(plain, x, [task], wrapped.lora_A, wrapped.lora_B, [1.0] * 4))


def test_a_new_thread_has_no_routing():
    seen = []
    with route(1):
        thread = threading.Thread(target=lambda: seen.append(current_routing()))
        thread.start()
        thread.join()
    assert seen == [None]
