"""Weights files: what loads, what is refused and how, and building a decomposition from its checkpoint."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from monai.networks.nets import resnet10
from torch import nn

from lorkd_monai.checkpoints.weights import fit_weights, load_decomposition, load_weights, save_weights
from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import LoRKDNet
from lorkd_monai.networks.spec import SPEC_KEY, write_spec

CONFIG = {"_target_": "BasicUNet", "spatial_dims": 2, "in_channels": 1, "features": [2, 2, 2, 2, 2, 2]}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_round_trip(tmp_path, suffix):
    state = nn.Conv2d(2, 3, 3).state_dict()
    save_weights(tmp_path / f"w{suffix}", state)
    assert same(load_weights(tmp_path / f"w{suffix}"), state)
    assert [p.name for p in tmp_path.iterdir()] == [f"w{suffix}"]


@pytest.mark.parametrize("key", ["model", "state_dict", "network", "net"])
def test_nested_and_distributed(tmp_path, key):
    state = nn.Conv2d(2, 3, 3).state_dict()
    content = {key: {f"module.{k}": v for k, v in state.items()}, "epoch": 3, "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "c.pt")
    assert same(load_weights(tmp_path / "c.pt"), state)


def test_tied_weights_round_trip(tmp_path):
    weight = torch.rand(2, 2)
    save_weights(tmp_path / "w.safetensors", {"a": weight, "b": weight, "c": weight.t()})
    assert torch.equal(load_weights(tmp_path / "w.safetensors")["c"], weight.t())


def test_missing_file(tmp_path):
    with pytest.raises(LoRKDError, match="no weights file"):
        load_weights(tmp_path / "nothing.pt")
    with pytest.raises(LoRKDError, match="no weights file"):
        load_weights(tmp_path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.98])
def test_truncated_file(tmp_path, suffix, kept):
    path = tmp_path / f"w{suffix}"
    save_weights(path, nn.Linear(30, 40).state_dict())
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(LoRKDError, match="not a complete"):
        load_weights(path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("write", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_pickle_of_code_is_refused_and_not_run(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write({"weight": Bomb()}, tmp_path / "w.pt")
    with pytest.raises(LoRKDError, match="could run code|not a complete weights file"):
        load_weights(tmp_path / "w.pt")
    assert not (tmp_path / "exploded").exists()


def test_whole_network_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "w.pt")
    with pytest.raises(LoRKDError, match=r"holds Python objects .* state_dict\(\)"):
        load_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("content", [torch.rand(3), [torch.rand(3)], {}, {"a": 1}, {"weights": {"a": torch.rand(1)}}])
def test_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(LoRKDError, match="holds no state dict"):
        load_weights(tmp_path / "w.pt")


def test_text_file(tmp_path):
    (tmp_path / "w.pt").write_text("hello\n")
    with pytest.raises(LoRKDError, match="not a complete weights file|could run code"):
        load_weights(tmp_path / "w.pt")


def test_save_refuses_what_is_no_state(tmp_path):
    with pytest.raises(LoRKDError, match="expected a state dict"):
        save_weights(tmp_path / "w.pt", {"a": 1})
    with pytest.raises(LoRKDError, match="does not exist"):
        save_weights(tmp_path / "no" / "w.pt", {"a": torch.rand(1)})


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    save_weights(tmp_path / "w.pt", {"a": torch.ones(1)})
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_weights(tmp_path / "w.pt", {"a": torch.zeros(1)})
    assert torch.equal(load_weights(tmp_path / "w.pt")["a"], torch.ones(1))
    assert [p.name for p in tmp_path.iterdir()] == ["w.pt"]


def test_fit_weights_lists_what_differs():
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    state = network.state_dict()
    state["extra"] = state.pop("0.bias")
    state["1.weight"] = torch.zeros(5, 3)
    with pytest.raises(
        LoRKDError, match=r"W does not fit.*1 missing \(0.bias\); 1 unknown \(extra\); 1.weight is \(5, 3"
    ):
        fit_weights(network, state, "W")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_load_decomposition_from_config(tmp_path, suffix):
    net = LoRKDNet(CONFIG, {"a": 2, "b": 3}, rank={"a": 1, "b": 2}, norm="task").eval()
    save_weights(tmp_path / f"c{suffix}", net.state_dict())
    again = load_decomposition(tmp_path / f"c{suffix}").eval()
    assert again.spec() == net.spec() and same(again.state_dict(), net.state_dict())
    x = torch.rand(2, 1, 32, 32)
    assert torch.equal(again(x, [1, 0]), net(x, [1, 0]))


def test_load_decomposition_with_backbone(tmp_path):
    backbone = resnet10(spatial_dims=2, n_input_channels=1, widen_factor=0.125, num_classes=3)
    net = LoRKDNet(backbone, {"a": 2, "b": 3}, rank=1)
    torch.save({"model": net.state_dict()}, tmp_path / "c.pt")
    with pytest.raises(LoRKDError, match="made from a network object: give that backbone"):
        load_decomposition(tmp_path / "c.pt")
    assert same(load_decomposition(tmp_path / "c.pt", backbone).state_dict(), net.state_dict())
    other = resnet10(spatial_dims=2, n_input_channels=3, widen_factor=0.125, num_classes=3)
    with pytest.raises(LoRKDError, match="does not fit the network LoRKDNet.*conv1"):
        load_decomposition(tmp_path / "c.pt", other)


def test_load_decomposition_refuses_other_files(tmp_path):
    save_weights(tmp_path / "plain.pt", nn.Linear(2, 2).state_dict())
    with pytest.raises(LoRKDError, match="holds no decomposition"):
        load_decomposition(tmp_path / "plain.pt")
    for nonsense in (torch.zeros(3, dtype=torch.uint8), torch.tensor(list(b"[1, 2]"), dtype=torch.uint8)):
        save_weights(tmp_path / "bad.pt", {SPEC_KEY: nonsense})
        with pytest.raises(LoRKDError, match="does not say which decomposition|names no tasks"):
            load_decomposition(tmp_path / "bad.pt")
    spec = LoRKDNet(CONFIG, {"a": 2}, rank=1).spec()
    for broken in ({**spec, "surprise": 1}, {k: v for k, v in spec.items() if k != "backbone"}, {**spec, "tasks": {}}):
        save_weights(tmp_path / "bad.pt", {SPEC_KEY: write_spec(broken)})
        with pytest.raises(LoRKDError):
            load_decomposition(tmp_path / "bad.pt")


@pytest.mark.parametrize(
    "config",
    [
        {"_target_": "os.mkdir", "path": "exploded"},
        {"_target_": "torch.load", "f": "x"},
        {"_target_": "monai.networks.nets.resnet.torch.load", "f": "x"},
        {"_target_": "monai.networks.nets.os.mkdir", "path": "exploded"},
        {**CONFIG, "features": "$__import__('os').mkdir('exploded')"},
        {**CONFIG, "features": ["$__import__('os').mkdir('exploded')"]},
        {**CONFIG, "act": {"_target_": "os.mkdir", "path": "exploded"}},
        {**CONFIG, "act": "%/etc/passwd"},
        {**CONFIG, "_mode_": "debug"},
    ],
)
def test_a_checkpoint_can_not_run_code(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    state = LoRKDNet(CONFIG, {"a": 2}, rank=1).state_dict()
    spec = json.loads(bytes(state[SPEC_KEY].tolist()))
    state[SPEC_KEY] = write_spec({**spec, "backbone": config})
    save_weights("c.pt", state)
    with pytest.raises(LoRKDError, match="ive the backbone"):
        load_decomposition("c.pt")
    assert not (tmp_path / "exploded").exists()
