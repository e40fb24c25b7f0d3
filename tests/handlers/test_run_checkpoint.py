"""Checkpoints: written whole, refused where they belong to another run, best weights by the score."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from lorkd_monai.errors import LoRKDError
from lorkd_monai.handlers import RunCheckpoint
from lorkd_monai.networks import LoRKDNet


def make_run(folder, *, epochs=3, scores=None, settings=None, network=None, seen=None):
    """A tiny training that depends on all that a checkpoint must hold: weights, momentum, schedule, epoch."""
    if network is None:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch))

    def step(engine, batch):
        if seen is not None:
            seen.append((engine.state.epoch, engine.state.iteration))
        optimizer.zero_grad()
        loss = network(batch + engine.state.iteration).square().mean()
        loss.backward()
        optimizer.step()

    trainer = Engine(step)
    evaluator = None
    if scores is not None:
        evaluator = SimpleNamespace(state=SimpleNamespace(metrics={}, epoch=0, key_metric_name="score"))

        def validate(engine):
            score = scores.get(engine.state.epoch)
            if score is not None:
                evaluator.state.metrics, evaluator.state.epoch = {"score": score}, engine.state.epoch

        trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: schedule.step())
    checkpoint = RunCheckpoint(
        folder, network, {"optimizer": optimizer, "schedule": schedule}, settings or {"seed": 0}, evaluator
    )
    checkpoint.attach(trainer)
    batches = [torch.arange(12.0).reshape(4, 3) / 10 + i for i in range(2)]
    return SimpleNamespace(
        network=network, checkpoint=checkpoint, trainer=trainer, go=lambda: trainer.run(batches, max_epochs=epochs)
    )


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in other)


def test_resumed_run_ends_bit_for_bit_as_the_whole_one(tmp_path):
    whole = make_run(tmp_path / "whole", epochs=4)
    whole.go()
    make_run(tmp_path / "killed", epochs=2).go()
    seen = []
    torch.manual_seed(5)
    again = make_run(tmp_path / "killed", epochs=4, network=nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3),
                                                                         nn.Linear(3, 1)), seen=seen)  # fmt: skip
    again.go()
    assert seen == [(3, 5), (3, 6), (4, 7), (4, 8)]
    assert same(again.network.state_dict(), whole.network.state_dict())


def test_complete_run_does_nothing(tmp_path):
    make_run(tmp_path).go()
    seen = []
    run = make_run(tmp_path, seen=seen)
    run.go()
    assert seen == []
    assert run.trainer.state.epoch == 3


def test_best_weights_are_of_the_first_best_epoch(tmp_path):
    run = make_run(tmp_path, scores={1: 0.1, 2: 0.7, 3: 0.7})
    kept = {}
    run.trainer.add_event_handler(
        Events.EPOCH_COMPLETED,
        lambda engine: kept.update({engine.state.epoch: {k: v.clone() for k, v in run.network.state_dict().items()}}),
    )
    run.go()
    assert run.checkpoint.best == {"epoch": 2, "score": 0.7}
    assert same(torch.load(run.checkpoint.model, weights_only=True), kept[2])


def test_the_best_of_before_is_remembered(tmp_path):
    make_run(tmp_path, epochs=1, scores={1: 0.9}).go()
    before = (tmp_path / "model.pt").read_bytes()
    run = make_run(tmp_path, epochs=3, scores={2: 0.5, 3: 0.6})
    run.go()
    assert run.checkpoint.best == {"epoch": 1, "score": 0.9}
    assert (tmp_path / "model.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ({2: 0.5}, {"epoch": 2, "score": 0.5}),  # not every epoch is evaluated
        ({}, {"epoch": 3}),  # none is: the last weights count
        ({1: float("nan"), 2: 0.1}, {"epoch": 2, "score": 0.1}),
        (None, {"epoch": 3, "score": 3.0}),
    ],
)
def test_epochs_without_a_score(tmp_path, scores, best):
    run = make_run(tmp_path, scores=scores)
    run.go()
    assert run.checkpoint.best == best
    assert (tmp_path / "model.pt").exists()


def test_epochs_without_a_score_after_a_resume(tmp_path):
    make_run(tmp_path, epochs=2, scores={2: 0.5}).go()
    run = make_run(tmp_path, epochs=3, scores={})
    run.go()
    assert run.checkpoint.best == {"epoch": 2, "score": 0.5}


def test_a_write_that_fails_leaves_the_former_file(tmp_path, monkeypatch):
    run = make_run(tmp_path, epochs=1)
    run.go()
    before = (tmp_path / "last.pt").read_bytes()

    def half(state, path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space left"):
        make_run(tmp_path, epochs=2).go()
    assert (tmp_path / "last.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "model.pt"]


def test_other_settings_are_named(tmp_path):
    make_run(tmp_path, settings={"seed": 0, "size": [1, 2]}).go()
    with pytest.raises(LoRKDError, match=r"other settings: seed was 0, now 1.*Give them again .* another --output_dir"):
        make_run(tmp_path, settings={"seed": 1, "size": [1, 2]}).go()
    with pytest.raises(LoRKDError, match=r"size was \[1, 2\], now None"):
        make_run(tmp_path, settings={"seed": 0}).go()


def write_bytes(path):
    path.write_bytes(b"\x00" * 100)


def write_truncated(path):
    path.write_bytes(path.read_bytes()[:-200])


def write_code(path):
    torch.save({"epoch": nn.Linear(1, 1), "best": {}, "settings": {}}, path)


def write_list(path):
    torch.save([1, 2], path)


def write_weights(path):
    torch.save({"weight": torch.ones(2)}, path)


@pytest.mark.parametrize("spoil", [write_bytes, write_truncated, write_code, write_list, write_weights])
def test_garbage_is_refused_and_left(tmp_path, spoil):
    make_run(tmp_path, epochs=1).go()
    spoil(tmp_path / "last.pt")
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(LoRKDError, match=r"last.pt can't be resumed from.*Delete it to start fresh, or give another"):
        make_run(tmp_path).go()
    assert (tmp_path / "last.pt").read_bytes() == before


def decomposition(tasks, rank):
    return LoRKDNet(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), tasks, rank)


@pytest.mark.parametrize(
    ("tasks", "rank", "words"),
    [
        ({"a": 2, "b": 2}, 1, "rank: checkpoint .* this network"),
        ({"b": 2, "a": 2}, 2, "tasks: checkpoint"),
        ({"a": 2, "c": 2}, 2, "tasks: checkpoint"),
        ({"a": 2}, 2, "tasks: checkpoint .*'b'"),
        ({"a": 2, "b": 2, "c": 2}, 2, "tasks: checkpoint .*'c'"),
    ],
)
def test_another_decomposition_is_refused_unchanged(tmp_path, tasks, rank, words):
    def checkpoint(network):
        trainer = Engine(lambda engine, batch: None)
        RunCheckpoint(tmp_path, network, {}, {}).attach(trainer)
        trainer.run([0], max_epochs=1)

    checkpoint(decomposition({"a": 2, "b": 2}, 2))
    network = decomposition(tasks, rank)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(LoRKDError, match=f"last.pt does not fit this run: .*{words}.*another --output_dir"):
        checkpoint(network)
    assert same(network.state_dict(), before)


def test_another_network_is_refused_by_what_differs(tmp_path):
    make_run(tmp_path).go()
    other = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
    with pytest.raises(LoRKDError, match=r"0.weight is \(3, 3\), expected \(5, 3\)"):
        make_run(tmp_path, network=other).go()


def test_another_optimizer_is_refused(tmp_path):
    make_run(tmp_path).go()
    run = make_run(tmp_path)
    run.checkpoint.objects["extra"] = run.checkpoint.objects["optimizer"]
    with pytest.raises(LoRKDError, match="last.pt does not fit this run: 'extra'"):
        run.go()


def test_gradient_scale_is_kept(tmp_path):
    def go(scale, epochs):
        run = make_run(tmp_path, epochs=epochs)
        run.trainer.scaler = SimpleNamespace(state=scale)
        run.trainer.scaler.state_dict = lambda: {"scale": run.trainer.scaler.state}
        run.trainer.scaler.load_state_dict = lambda state: setattr(run.trainer.scaler, "state", state["scale"])
        run.go()
        return run.trainer.scaler.state

    assert go(512.0, 1) == 512.0
    assert go(1.0, 2) == 512.0
