"""Heads of single 3D samples in one vectorised call: the same numbers and gradients as one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorkd_monai.networks import banks
from lorkd_monai.networks.banks import HeadBank
from lorkd_monai.networks.routing import route


def head(classes: int, norm: nn.Module | None = None) -> nn.Module:
    middle = [] if norm is None else [norm]
    return nn.Sequential(
        nn.ConvTranspose3d(4, classes, 3, 2, 1, 1), *middle, nn.PReLU(), nn.Conv3d(classes, classes, 3, padding=1)
    )


@pytest.mark.parametrize("tasks", [[0, 1, 2], [2, 0, 1, 2, 0]])
@pytest.mark.parametrize("norm", [None, nn.InstanceNorm3d(3)])
def test_equal_to_one_after_the_other(monkeypatch, tasks, norm):
    torch.manual_seed(0)
    bank = HeadBank([head(3, norm) for _ in range(3)], [3, 3, 3])
    x = torch.randn(len(tasks), 4, 5, 6, 4, requires_grad=True)
    calls = []
    monkeypatch.setattr(banks, "run_together", lambda *a, own=banks.run_together: calls.append(1) or own(*a))

    def run() -> list[torch.Tensor]:
        bank.zero_grad()
        x.grad = None
        with route(tasks):
            y = bank(x)
        y.square().mean().backward()
        return [y.detach(), x.grad, *(p.grad.clone() for p in bank.parameters())]

    together = run()
    assert calls == [1]
    monkeypatch.setattr(banks, "slow_one_by_one", lambda *_: False)
    for a, b in zip(together, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("heads", "classes"),
    [
        ([head(3), head(2)], [3, 2]),
        ([head(3, nn.BatchNorm3d(3)), head(3, nn.BatchNorm3d(3))], [3, 3]),
    ],
)
def test_heads_that_differ_or_change_when_called_go_one_after_the_other(monkeypatch, heads, classes):
    monkeypatch.setattr(banks, "run_together", lambda *_: pytest.fail("must not be called"))
    with route([0, 1]):
        assert HeadBank(heads, classes)(torch.randn(2, 4, 5, 5, 5)).shape == (2, 3, 10, 10, 10)


def test_many_channels_take_the_grouped_form():
    torch.manual_seed(0)
    heads = [nn.Conv3d(4, 40, 3, padding=1) for _ in range(3)]
    x = torch.randn(3, 4, 5, 5, 5)
    together = banks.run_together(heads, x, [2, 0, 1])
    expected = torch.cat([heads[h](x[i : i + 1]) for i, h in enumerate([2, 0, 1])])
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)
