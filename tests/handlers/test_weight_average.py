"""The average of the weights: by its formula, through a killed run, and where there is nothing to average."""

from __future__ import annotations

import copy

import pytest
import torch
from ignite.engine import Engine
from torch import nn

from lorkd_monai.errors import LoRKDError
from lorkd_monai.handlers import RunCheckpoint, WeightAverage
from lorkd_monai.networks import LoRKDNet
from tests.small_networks import SMALL_RESNET

BATCHES = [torch.arange(12.0).reshape(4, 3) / 10 + i for i in range(3)]


class Run:
    """A small training with an average of its weights, a checkpoint, and all weights that it went through."""

    def __init__(self, folder, share=0.9, seed=0):
        torch.manual_seed(seed)
        self.network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        self.network[0].bias.requires_grad_(False)
        self.optimizer = torch.optim.AdamW([p for p in self.network.parameters() if p.requires_grad], lr=0.1)
        self.average = WeightAverage(self.network, share)
        self.seen = []
        self.trainer = Engine(self.step)
        self.average.attach(self.trainer)
        self.checkpoint = RunCheckpoint(
            folder, self.network, {"optimizer": self.optimizer, "average": self.average}, {}, kept=self.average.network
        )
        self.checkpoint.attach(self.trainer)

    def step(self, engine, batch):
        self.optimizer.zero_grad()
        self.network(batch + engine.state.iteration).square().mean().backward()
        self.optimizer.step()
        self.seen.append(copy.deepcopy(self.network.state_dict()))

    def go(self, epochs):
        self.trainer.run(BATCHES, max_epochs=epochs)
        return self


def test_it_is_the_average_of_its_formula(tmp_path):
    run = Run(tmp_path, share=0.5).go(4)
    expected = {k: v.double() for k, v in run.seen[0].items()}
    for n, state in enumerate(run.seen[1:], 1):
        kept = min(0.5, (1 + n) / (10 + n))
        expected = {k: kept * v + (1 - kept) * state[k].double() for k, v in expected.items()}
    found, last = run.average.network.state_dict(), run.network.state_dict()
    for key, value in found.items():
        if "running" in key or "num_batches" in key:
            assert torch.equal(value, last[key]), key  # a buffer: the network's own
        else:
            assert (value - expected[key]).abs().max() < 1e-6, key
    assert (found["2.weight"] - last["2.weight"]).abs().max() > 1e-3
    assert torch.equal(found["0.bias"], run.seen[0]["0.bias"])  # what is frozen stays as it is, to the last bit


def test_the_checkpoint_keeps_the_average_and_goes_on_from_both(tmp_path):
    whole = Run(tmp_path / "whole").go(5)
    Run(tmp_path / "killed").go(2)
    again = Run(tmp_path / "killed", seed=7).go(5)
    for one, other in ((again.network, whole.network), (again.average.network, whole.average.network)):
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())
    kept = torch.load(tmp_path / "killed" / "model.pt", weights_only=True)
    assert all(torch.equal(v, kept[k]) for k, v in whole.average.network.state_dict().items())
    assert not torch.equal(kept["2.weight"], whole.network.state_dict()["2.weight"])


def test_without_averaging_it_is_the_network(tmp_path):
    run = Run(tmp_path, share=0).go(1)
    assert run.average.network is run.network and run.average.state_dict() == {}
    kept = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(torch.equal(v, kept[k]) for k, v in run.network.state_dict().items())


def test_experts_of_the_average_compute_with_their_own_weights():
    torch.manual_seed(0)
    network = LoRKDNet(SMALL_RESNET, {"a": 2, "b": 3}, rank=2, norm="task")
    average = WeightAverage(network, 0.9)
    trainer = Engine(lambda engine, batch: [p.data.add_(torch.randn_like(p) * 0.05) for p in network.parameters()])
    average.attach(trainer)
    trainer.run(range(5))
    x, task = torch.rand(4, 3, 24, 24), torch.tensor([0, 1, 1, 0])
    fresh = LoRKDNet(SMALL_RESNET, {"a": 2, "b": 3}, rank=2, norm="task")
    fresh.load_state_dict(average.network.state_dict())
    with torch.no_grad():
        found, expected = average.network.eval()(x, task), fresh.eval()(x, task)
        other = network.eval()(x, task)
    assert torch.equal(found, expected)
    finite = other.isfinite()
    assert (found[finite] - other[finite]).abs().max() > 1e-3


@pytest.mark.parametrize("share", [1, -0.1, "much", True, float("nan")])
def test_bad_share(share):
    with pytest.raises(LoRKDError, match="share of a weight average: expected a number from 0 to below 1"):
        WeightAverage(nn.Linear(1, 1), share)
