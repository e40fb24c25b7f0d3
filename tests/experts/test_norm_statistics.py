"""Batch-norm statistics, re-estimated on a task's own images."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.networks.nets import BasicUNet
from torch import nn

from lorkd_monai.errors import LoRKDError
from lorkd_monai.experts.norm_statistics import reestimate_norms
from lorkd_monai.networks import LoRKDNet
from tests.networks.common import made


def network():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(72, 4)
    )


def test_average_over_the_batches_by_hand():
    net = network().eval()
    batches = [torch.rand(4, 1, 8, 8) + i for i in range(3)]
    before = copy.deepcopy(net.state_dict())
    assert reestimate_norms(net, batches) == 3
    h = [net[0](b) for b in batches]
    assert torch.allclose(net[1].running_mean, torch.stack([a.mean((0, 2, 3)) for a in h]).mean(0), atol=1e-6)
    assert torch.allclose(net[1].running_var, torch.stack([a.var((0, 2, 3)) for a in h]).mean(0), atol=1e-6)
    assert net[1].momentum == 0.1 and not any(m.training for m in net.modules())
    assert {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])} == {
        "1.running_mean", "1.running_var", "1.num_batches_tracked",
    }  # fmt: skip


def test_training_mode_comes_back():
    net = network().train()
    net[3].eval()
    reestimate_norms(net, [torch.rand(4, 1, 8, 8)])
    assert net.training and net[1].training and not net[3].training


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"image": x, "label": 0}, lambda x: (x, 0), lambda x: [x]])
def test_forms_of_batches(wrap):
    assert reestimate_norms(network(), iter([wrap(torch.rand(4, 1, 8, 8))])) == 1


def test_one_task_of_a_decomposition():
    net = made(network(), {"a": 4, "b": 2}, norm="task")
    x = torch.rand(8, 1, 8, 8) * 3
    expert = net.extract("b")
    state = copy.deepcopy(net.state_dict())
    other = net.extract("a")
    reestimate_norms(net, [x], "b")
    reestimate_norms(expert, [x])
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, state[k])}
    assert changed and all(".tasks.1." in k for k in changed)
    with torch.no_grad():
        assert torch.allclose(net(x, "b")[:, :2], expert(x), atol=1e-5)
        assert torch.equal(net(x, "a"), other(x))
        assert torch.equal(net.extract("b")(x), net(x, "b")[:, :2])


def test_refusals_keep_the_old_statistics():
    net = network()
    state = copy.deepcopy(net.state_dict())
    for batches, message in (
        ([], "no batches"),
        ([torch.rand(4, 1, 8, 8), "image"], "must be a tensor of images"),
        ([{"label": 1}], "must be a tensor of images"),
        ([torch.full((4, 1, 8, 8), float("nan"))], "NaN or infinite"),
    ):
        with pytest.raises(LoRKDError, match=message):
            reestimate_norms(net, batches)
        assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    with pytest.raises(LoRKDError, match="has no batch norm"):
        reestimate_norms(BasicUNet(2, features=(2, 2, 2, 2, 2, 2)), [torch.rand(1, 1, 32, 32)])
    with pytest.raises(LoRKDError, match="share their norms.*norm='task', or extract"):
        reestimate_norms(LoRKDNet(network(), {"a": 4}), [torch.rand(4, 1, 8, 8)], "a")
    with pytest.raises(LoRKDError, match="task is needed"):
        reestimate_norms(LoRKDNet(network(), {"a": 4}, norm="task"), [torch.rand(4, 1, 8, 8)])


def test_a_task_with_one_value_a_channel_takes_its_running_statistics():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    net = LoRKDNet(backbone, {"a": 2, "b": 2}, norm="task").double().train()
    x = torch.rand(3, 1, 3, 3).double()
    y = net(x, [0, 1, 0])  # one sample of task b, 1 × 1 after the convolution
    y.sum().backward()
    assert torch.allclose(y[1], net.extract("b").eval()(x[1:2])[0])
    assert not torch.allclose(y[0], net.extract("a").eval()(x[:1])[0])
