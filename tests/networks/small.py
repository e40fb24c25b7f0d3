"""Small networks of the user's, and the check that one is decomposed rightly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorkd_monai.networks import LoRKDNet
from tests.networks.common import TASKS, assert_nothing_of_ours, made, main_outputs
from tests.networks.reference import assert_close

NAMES = list(TASKS)
ROWS = [2, 0, 1, 0]


def check(backbone: nn.Module, x: Tensor, plain: bool = True, **options) -> LoRKDNet:
    """Fresh = backbone, mixed = separate, extraction exact and plain."""
    backbone = backbone.double().eval()
    x = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        expected = main_outputs(backbone(x))
        for a, b in zip(
            main_outputs(LoRKDNet(backbone, TASKS, rank=1, **options).eval()(x, "a")), expected, strict=True
        ):
            assert_close(a, b, what="fresh")
    net = made(backbone, **options).double()
    tasks = (ROWS * len(x))[: len(x)]
    mixed = main_outputs(net(x, torch.tensor(tasks)))
    for row, task in enumerate(tasks):
        for m, a in zip(mixed, main_outputs(net(x[row : row + 1], task)), strict=True):
            assert_close(m[row : row + 1], a, what="mixed")
    for task in NAMES:
        expert = net.extract(task)
        if plain:
            assert_nothing_of_ours(expert, backbone)
        with torch.no_grad():
            for y, own in zip(main_outputs(expert(x)), main_outputs(net(x, task)), strict=True):
                assert torch.equal(own[:, : TASKS[task]], y)
    return net


class Net(nn.Module):
    """conv → relu → conv → pool → linear."""

    def __init__(self, first=None, second=None):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1) if first is None else first
        self.second = nn.Conv2d(4, 4, 3, padding=1) if second is None else second
        self.fc = nn.Linear(4, 4)

    def features(self, x):
        return self.second(self.first(x).relu()).mean((2, 3))

    def forward(self, x):
        return self.fc(self.features(x))


X = torch.rand(4, 2, 6, 6, generator=torch.Generator().manual_seed(3))
