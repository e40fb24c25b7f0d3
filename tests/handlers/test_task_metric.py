"""The score that chooses the best epoch: of each task, their mean, and gathered over processes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from ignite.engine import Engine

from lorkd_monai.handlers import TaskMetric

INF = float("-inf")

GATHER = """
import sys, torch, ignite.distributed as idist
sys.path.insert(0, sys.argv[1])
from lorkd_monai.handlers import TaskMetric

def work(rank):
    metric = TaskMetric({"a": 2, "b": 2})
    # The processes hold different numbers of images; the second none of task b.
    pred = torch.eye(2)[torch.tensor([[0, 1, 0], [1, 0, 1]][rank][: 3 - rank])]
    task = torch.tensor([[0, 0, 1], [0, 0, 0]][rank][: 3 - rank])
    metric.update((pred, torch.tensor([0, 1, 1])[: 3 - rank], task))
    with open(f"{sys.argv[2]}/{rank}.txt", "w") as file:
        file.write(f"{metric.per_task()} {metric.compute()}")

if __name__ == "__main__":
    idist.spawn("gloo", work, (), nproc_per_node=2, start_method="fork")
"""


def test_scores_by_hand():
    metric = TaskMetric({"a": 2, "b": 3, "c": 2})
    pred = torch.tensor([[2.0, 1.0, INF], [0.0, 1.0, INF], [0.1, 0.2, 0.3], [0.9, 0.2, 0.3], [0.0, 5.0, 1.0]])
    label, task = torch.tensor([0, 0, 2, 2, 1]), torch.tensor([0, 0, 1, 1, 1])
    metric.update((pred, label, task))
    # b: class 1 always right, class 2 half: 3/4. c has no images and does not count.
    assert metric.per_task() == pytest.approx({"a": 0.5, "b": 0.75})
    assert metric.compute() == pytest.approx(0.625)
    metric.reset()
    assert metric.per_task() == {}
    assert metric.compute() == 0


def test_a_wide_output_is_read_up_to_the_task_s_own_classes():
    metric = TaskMetric({"a": 2, "b": 3})
    metric.update((torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([1]), torch.tensor(0)))
    assert metric.per_task() == {"a": 1.0}


def test_dice_of_masks():
    metric = TaskMetric({"a": 2, "b": 3}, kind="segmentation")
    label = torch.zeros(3, 1, 8, 8, dtype=torch.long)
    label[0, 0, 2:6] = 1
    label[1, 0, :4], label[1, 0, 4:] = 1, 2
    pred = torch.nn.functional.one_hot(label[:, 0], 3).movedim(-1, 1).float()
    pred[0, :, 2:4] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]  # half of the structure is missed
    pred[0, 2] = INF
    # The third image has nothing of its task, in neither mask: it does not count.
    metric.update((pred, label, torch.tensor([0, 1, 0])))
    assert metric.per_task() == pytest.approx({"a": 2 * 16 / 48, "b": 1.0})


def test_the_engine_gets_each_task_and_the_mean():
    engine = Engine(lambda engine, batch: batch)
    TaskMetric({"a": 2, "b": 2}).attach(engine, "mean")
    pred, label = torch.eye(2), torch.tensor([0, 0])
    engine.run([{"pred": pred, "label": label, "task": torch.tensor([0, 1])}])
    assert engine.state.metrics == {"mean": 0.5, "a": 1.0, "b": 0.0}
    engine.run([{"pred": pred, "label": torch.tensor([0, 1]), "task": torch.tensor([0, 1])}])
    assert engine.state.metrics["mean"] == 1.0


def test_gathered_over_processes(tmp_path, repository):
    script = tmp_path / "gather.py"
    script.write_text(GATHER)
    command = [sys.executable, "-W", "ignore", script, repository, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # a: predictions 0 1 | 1 0 for the labels 0 1 | 0 1; b: 0 for 1. Each process has the scores of both.
    for rank in range(2):
        assert (tmp_path / f"{rank}.txt").read_text() == "{'a': 0.5, 'b': 0.0} 0.25"
