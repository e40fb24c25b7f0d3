"""The networks of a study, and what is found out about them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lorkd_monai.data import DataList, TaskSpec
from lorkd_monai.networks import LoRKDNet, TaskChannels
from lorkd_monai.study import default_settings
from lorkd_monai.study.diagnostics import gradient_conflict, spectra
from lorkd_monai.study.measures import cost_of, peak_memory, plain_networks
from lorkd_monai.study.models import (
    MeanNetwork,
    OneEach,
    build_student,
    choose_ranks,
    members_of,
    teacher_of,
    teacher_view,
)
from lorkd_monai.teachers.cache import RememberedTeacher

CLASSES = {"a": 2, "b": 3}
SETTINGS = default_settings("classification", 2).changed(
    {
        "backbone": {"_target_": "UNet", "spatial_dims": 2, "in_channels": 1, "channels": [4, 8], "strides": [2]},
        "teacher_backbone": {
            "_target_": "UNet",
            "spatial_dims": 2,
            "in_channels": 1,
            "channels": [8, 16],
            "strides": [2],
        },
        "in_channels": 1,
        "image_size": 16,
    }
)


def data(counts: dict[str, int] = {"a": 4, "b": 8}) -> DataList:  # noqa: B006
    tasks = {n: TaskSpec(n, i, {c: str(c) for c in range(CLASSES[n])}) for i, n in enumerate(CLASSES)}
    items = [{"image": "", "label": 0, "task": n} for n, k in counts.items() for _ in range(k)]
    return DataList("x", Path(), "classification", 2, tasks, training=items)


class Small(nn.Module):
    """A convolution, a pooled head."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, width, 3, padding=1), nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


def test_ranks_by_the_size_of_the_task() -> None:
    assert choose_ranks(SETTINGS, {"a": 5, "b": 1}) == 4
    imbalanced = SETTINGS.changed({"rank": "imbalanced"})
    assert choose_ranks(imbalanced, {"a": 500, "b": 10, "c": 80}) == {"a": 8, "b": 2, "c": 4}


def test_students_of_a_seed_start_alike() -> None:
    with_experts, without = (build_student(SETTINGS, data(), experts, 5) for experts in (True, False))
    x = torch.rand(2, 1, 16, 16)
    task = torch.tensor([0, 1])
    assert with_experts.expert_layers and not without.expert_layers
    own = dict(without.backbone.named_parameters())
    layer, wrapped = next(iter(with_experts.expert_layers.items()))
    torch.testing.assert_close(wrapped.layer.weight, own[f"{layer}.weight"])
    assert with_experts(x, task).shape == without(x, task).shape == (2, 3, 16, 16)


def test_networks_of_one_task_act_as_one() -> None:
    networks = {n: LoRKDNet(Small(3, k), {n: k}, rank=0) for n, k in CLASSES.items()}
    joined = OneEach(networks, CLASSES).eval()
    x, task = torch.rand(3, 1, 8, 8), torch.tensor([1, 0, 1])
    y = joined(x, task)
    torch.testing.assert_close(y[1, :2], networks["a"].eval()(x[1:2], 0)[0])
    torch.testing.assert_close(y[2], networks["b"].eval()(x[2:], 0)[0])
    assert y[1, 2].isneginf()


def test_an_ensemble_is_the_mean() -> None:
    one, two = Small(3, 5), Small(3, 5)
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(MeanNetwork([one, two])(x), (one(x) + two(x)) / 2)


def test_a_teacher_knows_some_of_its_tasks() -> None:
    view = TaskChannels(Small(3, 5), CLASSES)
    x = torch.rand(2, 1, 8, 8)
    teacher = teacher_of(view, ["b"])
    torch.testing.assert_close(teacher(x, torch.tensor([0, 0])), view.network(x)[:, 2:])
    assert members_of(view) == [view.network]


def test_teacher_from_the_weights_of_its_members() -> None:
    views = [TaskChannels.build(SETTINGS.teacher_backbone, CLASSES) for _ in range(2)]
    view = teacher_view(SETTINGS, data(), [v.state_dict() for v in views])
    x, task = torch.rand(1, 1, 32, 32), torch.tensor([1])
    expected = sum(v.eval()(x, task) for v in views) / 2
    torch.testing.assert_close(view.eval()(x, task), expected)
    assert len(members_of(view)) == 2


def test_remembered_answers_are_the_teachers() -> None:
    teacher = teacher_of(TaskChannels(Small(3, 5), CLASSES), list(CLASSES))
    calls = []
    teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    remembered = RememberedTeacher(teacher)
    x, task = torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 0])
    first, second = remembered(x, task), remembered(x, task)
    torch.testing.assert_close(first, teacher(x, task), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    remembered(x, torch.tensor([1, 1, 0]))
    remembered(x + 1, task)
    assert len(calls) == 1 + 1 + 2
    full = RememberedTeacher(teacher, memory=0)
    torch.testing.assert_close(full(x, task), first, rtol=0, atol=0)
    assert not full._memory


class Images(torch.utils.data.Dataset):
    """Bright and dark images; the tasks name them the other way round."""

    task_of_item = [0] * 8 + [1] * 8

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        task, bright = self.task_of_item[i], i % 2
        image = torch.full((1, 8, 8), float(bright))
        return {"image": image, "label": torch.tensor(bright if task == 0 else 1 - bright), "task": torch.tensor(task)}


def test_opposite_tasks_conflict() -> None:
    """Two heads with the same weights and opposite labels: the gradients on shared weights are opposite too."""
    torch.manual_seed(0)
    tasks = {n: TaskSpec(n, i, {0: "no", 1: "yes"}) for i, n in enumerate("ab")}
    both = DataList("x", Path(), "classification", 2, tasks)
    network = LoRKDNet(Small(4, 2), {"a": 2, "b": 2}, rank=0)
    network.load_expert_state_dict("b", network.expert_state_dict("a"))
    for name in "ab":
        head = network.expert_tensors("ab".index(name))
        for tensor in head.values():
            tensor.requires_grad_(True)
    found = gradient_conflict(network, both, Images(), images=8, batch=3)
    assert found["tasks"] == ["a", "b"]
    assert found["cosines"][0][0] == pytest.approx(1.0)
    assert found["cosines"][0][1] < -0.9 and found["by_layer"]["conv.weight"] < -0.9


def test_spectrum_of_fresh_experts_is_empty() -> None:
    network = LoRKDNet(Small(4, 2), CLASSES, rank=2)
    found = spectra(network)["b"]["conv"]
    assert found == {"values": [], "relative_size": 0.0}
    with torch.no_grad():
        for layer in network.expert_layers.values():
            layer.lora_B[1].fill_(0.1)
    found = spectra(network)["b"]["conv"]
    change = network.expert_layers["conv"]
    delta = change.fused_weight(1) - change.layer.weight
    assert sum(v**2 for v in found["values"]) == pytest.approx(float(delta.detach().square().sum()), rel=1e-3)


def test_costs_by_hand() -> None:
    network = LoRKDNet(Small(3, 2), CLASSES, rank=1).eval()
    cost = cost_of(network, ["a", "b"], (1, 8, 8), repeats=1)
    assert cost["plain"]["a"]["parameters"] == 3 * 9 + 3 + 2 * 3 + 2
    assert cost["plain"]["b"]["multiply_adds"] == 8 * 8 * 3 * 9 + 3 * 3
    assert cost["parameters"] == sum(p.numel() for p in network.parameters())
    view = TaskChannels(Small(3, 5), CLASSES)
    assert plain_networks(view, ["a", "b"])["b"] is view.network


def test_memory_is_told_or_unknown() -> None:
    with peak_memory("cpu") as found:
        torch.zeros(10)
    assert found["gpu"] is None and (found["process"] is None or found["process"] > 1e6)
