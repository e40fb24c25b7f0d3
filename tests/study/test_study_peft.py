"""The rival with PEFT's adapters: frozen but for adapter and head, merged exactly, shared and counted once.

Most tests run with a stand-in for the package `peft` that has its names and its arithmetic, and with the package itself
where it is installed.
"""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from lorkd_monai.data import load_data_list, make_phantoms
from lorkd_monai.errors import LoRKDError
from lorkd_monai.losses import LoRKDLoss
from lorkd_monai.study import default_settings, methods_named, plan_runs, run_study
from lorkd_monai.study.files import RunFile
from lorkd_monai.study.measures import cost_of
from lorkd_monai.study.models import OneEach
from lorkd_monai.study.peft_rival import adapt, adapter_facts, share_frozen
from lorkd_monai.study.training import _groups

SETTINGS = default_settings("classification", 2).changed({"rank": 2, "alpha": 6.0})


class Adapter(nn.Module):
    """A layer with one adapter, under PEFT's names."""

    def __init__(self, base: nn.Module, rank: int, alpha: float) -> None:
        super().__init__()
        self.base_layer, self.active_adapters, self.scaling = base, ["default"], {"default": alpha / rank}
        if isinstance(base, nn.Linear):
            a, b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        else:
            kind = type(base)
            a = kind(base.in_channels, rank, base.kernel_size, base.stride, base.padding, bias=False)
            b = kind(rank, base.out_channels, 1, bias=False)
        nn.init.zeros_(b.weight)
        self.lora_A, self.lora_B = nn.ModuleDict({"default": a}), nn.ModuleDict({"default": b})

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = self.lora_B["default"](self.lora_A["default"](x))
        return self.base_layer(x) + own * self.scaling["default"]


def stand_in() -> types.ModuleType:
    def inject(config, model):
        for name, module in list(model.named_modules()):
            if re.fullmatch(config.target_modules, name):
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, Adapter(module, config.r, config.lora_alpha))
        return model

    fake = types.ModuleType("peft")
    fake.LoraConfig = lambda **kwargs: types.SimpleNamespace(**kwargs)
    fake.inject_adapter_in_model = inject
    return fake


@pytest.fixture(params=["stand-in", "peft"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "peft":
        pytest.importorskip("peft")
    else:
        monkeypatch.setitem(sys.modules, "peft", stand_in())


class Small(nn.Module):
    """Convolutions of all kinds, one of them named like the end of another, a norm and a pooled head."""

    def __init__(self, dims: int = 2, classes: int = 3) -> None:
        super().__init__()
        conv, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")
        self.conv, self.norm = conv(1, 4, 3, padding=1), norm(4)
        self.block = nn.ModuleDict({"conv": conv(4, 4, 1), "grouped": conv(4, 4, 3, padding=1, groups=2)})
        self.dilated, self.linear = conv(4, 4, 3, padding=2, dilation=2), nn.Linear(4, 5)
        self.head = nn.Linear(5, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x)).relu()
        y = self.dilated(self.block["grouped"](self.block["conv"](y))).flatten(2).mean(2)
        return self.head(self.linear(y).relu())


def learn(network: nn.Module) -> None:
    """Weights that an adapter could have after training."""
    with torch.no_grad():
        for parameter in network.factors:
            parameter.copy_(torch.randn_like(parameter))


@pytest.mark.parametrize("dims", [2, 3])
def test_an_adapter_on_a_frozen_student(library: None, dims: int) -> None:
    torch.manual_seed(0)
    plain = Small(dims).eval()
    x = torch.rand(2, 1, *[8] * dims)
    network = adapt(plain, "a", 3, SETTINGS, 0).eval()
    torch.testing.assert_close(network(x, 0), plain(x))  # B starts at 0
    assert list(network.adapter_layers) == ["conv", "block.conv", "linear"]
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or "head" in name for name in trained) and len(trained) == 2 * 3 + 2
    learn(network)
    merged = network.extract("a")
    assert type(merged) is Small and sum(p.numel() for p in merged.parameters()) == sum(
        p.numel() for p in plain.parameters()
    )
    assert not torch.equal(merged.conv.weight, plain.conv.weight)
    torch.testing.assert_close(merged.eval()(x), network(x, 0), rtol=1e-4, atol=1e-4)
    facts = adapter_facts(network)
    assert facts["layers_without"] == ["block.grouped", "dilated"]
    assert facts["parameters"] == 2 * (3**dims + 4) + 2 * (4 + 4) + 2 * (4 + 5)


def test_a_frozen_student_keeps_its_statistics(library: None) -> None:
    network = adapt(Small(), "a", 3, SETTINGS, 0).train()
    before = network.backbone.norm.running_mean.clone()
    network(torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))
    assert torch.equal(network.backbone.norm.running_mean, before)
    own = adapt(Small(), "a", 3, SETTINGS.changed({"norm": "task"}), 0).train()
    own(torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))
    assert not torch.equal(own.backbone.norm.running_mean, before) and own.backbone.norm.weight.requires_grad


def test_the_frozen_student_is_counted_once(library: None) -> None:
    plain = Small()
    networks = {name: adapt(plain, name, 3, SETTINGS, 0) for name in "ab"}
    for network in networks.values():
        learn(network)
    before = [n.eval()(torch.ones(1, 1, 8, 8), 0).detach() for n in networks.values()]
    share_frozen(list(networks.values()))
    cost = cost_of(OneEach(networks, dict.fromkeys("ab", 3)).eval(), ["a", "b"], (1, 8, 8), repeats=1)
    student, head = sum(p.numel() for p in plain.parameters()), 5 * 3 + 3
    assert cost["plain"]["a"]["parameters"] == student
    assert cost["parameters"] == student + head + 2 * adapter_facts(networks["a"])["parameters"]
    for y, network in zip(before, networks.values(), strict=True):
        torch.testing.assert_close(network(torch.ones(1, 1, 8, 8), 0), y)


def test_an_adapter_has_a_rate_of_its_own(library: None) -> None:
    network = adapt(Small(), "a", 3, SETTINGS, 0)
    settings = SETTINGS.changed({"expert_learning_rate": 5.0})
    rest, factors = _groups(network, LoRKDLoss("ce", 0.0, tasks={"a": 3}), settings)
    assert factors["lr"] == pytest.approx(5 * settings.learning_rate) and len(factors["params"]) == 6
    assert not {id(p) for p in rest["params"]} & {id(p) for p in factors["params"]}


def test_one_rank_for_all(library: None) -> None:
    with pytest.raises(LoRKDError, match="PEFT's adapters have one rank for all tasks, got 'imbalanced'"):
        adapt(Small(), "a", 3, SETTINGS.changed({"rank": "imbalanced"}), 0)


BACKBONE = {"_target_": "UNet", "spatial_dims": 2, "in_channels": 1, "channels": [4, 8], "strides": [2]}


def tiny(folder: Path, kind: str):
    make_phantoms(folder, kind, 2, num_images=10, image_size=16)
    data = load_data_list(folder, kind, 2)
    net = BACKBONE if kind == "segmentation" else {
        "_target_": "DenseNet", "spatial_dims": 2, "in_channels": 1, "init_features": 4, "growth_rate": 4,
        "block_config": [1, 1],
    }  # fmt: skip
    return data, default_settings(kind, 2).changed(
        {
            "backbone": net, "teacher_backbone": net, "in_channels": 1, "image_size": 16, "epochs": 2, "resamples": 10,
            "teacher_epochs": 1, "images_per_epoch": 16, "batch_size": 8, "single_batch_size": 4, "val_interval": 1,
        }
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
def test_a_study_with_adapters(library: None, tmp_path: Path, kind: str) -> None:
    data, settings = tiny(tmp_path / "data", kind)
    runs = plan_runs(methods_named(["teacher", "peft_lora"]), ["full"], [0])
    folder = run_study(tmp_path / "out", data, settings, runs, say=lambda _: None)
    run = RunFile(folder, "full", "peft_lora", 0).read()
    assert run["family"] == "peft" and set(run["fits"]) == {"all tasks", *data.tasks}
    assert sum(fit["images"] for fit in run["fits"].values()) <= 2 * 16 + 4 * len(data.tasks)
    served = [one["parameters"] for one in run["cost"]["plain"].values()]
    added = [facts["parameters"] for facts in run["adapters"].values()]
    assert all(facts["layers"] for facts in run["adapters"].values())
    assert sum(added) + max(served) < run["cost"]["parameters"] < sum(added) + sum(served)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    data, settings = tiny(tmp_path / "data", "classification")
    runs = plan_runs(methods_named(["teacher", "peft_lora"]), ["full"], [0])
    with pytest.raises(LoRKDError, match=r"needs the package peft: pip install 'lorkd-monai\[peft\]'"):
        run_study(tmp_path / "out", data, settings, runs, say=lambda _: None)
    assert not (tmp_path / "out").exists()
