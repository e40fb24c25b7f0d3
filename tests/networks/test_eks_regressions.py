"""What once went wrong in the operation of one layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lorkd_monai.networks import LowRankLayer, route
from tests.networks.reference import assert_close, reference


@pytest.mark.parametrize("tasks", [[0, 1, 2], [2, 0, 1], [0, 0, 1, 1], [1, 1], [0]])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv2d(2, 3, 1), (5, 5)), (nn.Conv2d(2, 3, 3, 2), (5, 5)), (nn.ConvTranspose2d(2, 3, 2), (3, 3)),
     (nn.Linear(2, 3), ())],
)  # fmt: skip
def test_activations_in_place(layer, shape, tasks):
    """A result that is a view of another tensor can't be changed in place, as nn.ReLU(inplace=True) does."""
    plain = copy.deepcopy(layer).double()
    wrapped = LowRankLayer(copy.deepcopy(plain), [2, 2, 2])
    for b in wrapped.lora_B:
        nn.init.normal_(b)
    x = torch.rand(len(tasks), 2, *shape).double().requires_grad_()
    expected = reference(plain, x, tasks, wrapped.lora_A, wrapped.lora_B, [1.0] * 3).relu()
    with route(tasks):
        y = torch.relu_(wrapped(x))
    assert_close(y, expected)
    weight = torch.rand_like(y)
    own = torch.autograd.grad(y, [x, wrapped.layer.weight], weight)
    for a, b in zip(own, torch.autograd.grad(expected, [x, plain.weight], weight)):
        assert_close(a, b)


def test_one_voxel_with_odd_strides():
    """A single token of a transformer, moved to the channel dimension, is contiguous with strides of its own."""
    plain = nn.ConvTranspose2d(4, 3, 2, 2).double()
    wrapped = LowRankLayer(copy.deepcopy(plain), [2, 2])
    for tasks in ([0, 1], [1, 0], [0, 0]):
        x = torch.rand(2, 1, 1, 4).double().requires_grad_()
        moved = x.permute(0, 3, 1, 2)
        with route(tasks):
            y = wrapped(moved)
        weight = torch.rand_like(y)
        own = torch.autograd.grad(y, [x, wrapped.layer.weight], weight)
        for a, b in zip(own, torch.autograd.grad(plain(moved), [x, plain.weight], weight)):
            assert_close(a, b)
