"""One training of a study: the choice of the epoch, the average of the weights, the parameter groups."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lorkd_monai.data import DataList, TaskSpec
from lorkd_monai.losses import LoRKDLoss
from lorkd_monai.networks import LoRKDNet
from lorkd_monai.study import default_settings
from lorkd_monai.study.training import _groups, _schedule, fit

CLASSES = {"a": 2, "b": 2}
TASKS = {name: TaskSpec(name, i, {0: "dark", 1: "bright"}) for i, name in enumerate(CLASSES)}
DATA = DataList("x", Path(), "classification", 2, TASKS)
SETTINGS = default_settings("classification", 2).changed(
    {
        "batch_size": 8,
        "learning_rate": 0.05,
        "ema": 0.0,
        "rotate": 0.0,
        "in_channels": 1,
        "image_size": 4,
        "images_per_epoch": 32,
    }
)


class Images(torch.utils.data.Dataset):
    """Dark and bright images of two tasks."""

    task_of_item = [i // 2 % 2 for i in range(32)]
    labelled = [True] * 32
    data = DATA

    def __len__(self) -> int:
        return 32

    def __getitem__(self, draw: int | tuple[int, int]) -> dict[str, torch.Tensor]:
        i = draw[0] if isinstance(draw, tuple) else draw
        image = torch.full((1, 4, 4), 0.2 + 0.6 * (i % 2))
        return {"image": image, "label": torch.tensor(i % 2), "task": torch.tensor(self.task_of_item[i])}


def network(rank: int = 1) -> LoRKDNet:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)]
    return LoRKDNet(nn.Sequential(*layers), CLASSES, rank=rank)


def trained(**changes: object):
    settings = SETTINGS.changed(changes)
    return fit(network(), Images(), Images(), settings, 0)


def test_learns_and_keeps_the_best_epoch() -> None:
    fitted = trained(epochs=4)
    scores = [row["mean"] for row in fitted.curves["validation"]]
    assert fitted.score == max(scores) and fitted.epoch == 1 + scores.index(max(scores))
    assert fitted.score > 0.9 and fitted.images == 4 * 32
    x, task = torch.stack([Images()[i]["image"] for i in (0, 1)]), torch.tensor([0, 0])
    assert fitted.network(x, task).argmax(1).tolist() == [0, 1]


def test_the_last_epoch_can_be_chosen() -> None:
    fitted = trained(epochs=3, selection="last", val_interval=2)
    assert fitted.epoch == 3 and [row["epoch"] for row in fitted.curves["validation"]] == [2, 3]


def test_the_same_seed_gives_the_same_weights() -> None:
    one, two = trained(epochs=2), trained(epochs=2)
    for a, b in zip(one.network.parameters(), two.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_averaged_weights_are_what_is_kept() -> None:
    plain, averaged = trained(epochs=2, selection="last"), trained(epochs=2, selection="last", ema=0.9)
    pairs = zip(plain.network.parameters(), averaged.network.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_batches_of_few_tasks() -> None:
    mixed, few = trained(epochs=2), trained(epochs=2, tasks_per_batch=1)
    assert few.images == mixed.images == 2 * 32
    # With one task in a batch the mean over the batch is that task's: its term is there in half of the steps.
    terms = few.curves["training"][0]
    assert terms["task"] == pytest.approx((terms["task/a"] + terms["task/b"]) / 2, rel=1e-4)
    assert trained(epochs=4, tasks_per_batch=2).score > 0.9


def test_without_validation_images_the_last_epoch_is_kept() -> None:
    empty = torch.utils.data.Subset(Images(), [])
    fitted = fit(network(), Images(), empty, SETTINGS.changed({"epochs": 2}), 0)
    assert fitted.epoch == 2 and fitted.curves["validation"] == []


def test_factors_have_a_decay_and_a_rate_of_their_own() -> None:
    settings = SETTINGS.changed({"expert_weight_decay": 0.5, "expert_learning_rate": 2.0})
    net = network()
    rest, factors = _groups(net, LoRKDLoss("ce", 0.0, tasks=CLASSES), settings)
    assert (rest["weight_decay"], factors["weight_decay"], factors["lr"]) == (0.01, 0.5, 0.1)
    assert len(factors["params"]) == 4  # A and B of two tasks in one layer
    assert len(rest["params"]) + len(factors["params"]) == len(list(net.parameters()))
    assert len(_groups(network(0), LoRKDLoss("ce", 0.0, tasks=CLASSES), settings)) == 1


def test_factors_wait_for_their_turn() -> None:
    settings = SETTINGS.changed({"expert_warmup": 2})
    optimizer = torch.optim.AdamW(_groups(network(), LoRKDLoss("ce", 0.0, tasks=CLASSES), settings), lr=0.05)
    schedule = _schedule(optimizer, 4, 2)
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert [late for _, late in rates[:2]] == [0.0, 0.0]
    assert all(late == early == pytest.approx(early) for early, late in rates[2:])
