"""Heads of single 3D samples in one vectorised call: the same numbers and gradients as one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorkd_monai.networks import task_banks as banks
from lorkd_monai.networks.routing.table import route
from lorkd_monai.networks.task_banks import HeadBank


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


@pytest.mark.parametrize(
    ("rows", "ins", "outs", "size", "options"),
    [
        (4, 3, 3, (9, 8, 7), {"kernel_size": 3, "padding": 1}),
        (3, 2, 4, (9, 8, 7), {"kernel_size": (3, 1, 5), "padding": (0, 0, 4), "dilation": (2, 1, 1)}),
        (2, 2, 2, (6, 5, 4), {"kernel_size": 2, "padding": 3, "bias": False}),  # more padding than the kernel reaches
        (4, 16, 16, (5, 4, 3), {"kernel_size": 3, "padding": 1}),
        (5, 16, 16, (5, 4, 3), {"kernel_size": 3, "padding": 1}),  # more channels than are computed for all rows
        (3, 2, 2, (9, 8, 7), {"kernel_size": 3, "padding": 1, "stride": 2}),
        (3, 2, 2, (9, 8, 7), {"kernel_size": 3, "padding": "same"}),
        (2, 4, 4, (60, 48, 2), {"kernel_size": 3, "padding": 1}),  # as channels of one sample
    ],
)
def test_convolutions_of_own_filters_equal_one_after_the_other(rows, ins, outs, size, options):
    torch.manual_seed(0)
    heads = [nn.Conv3d(ins, outs, **options) for _ in range(rows)]
    x = torch.randn(rows, ins, *size, requires_grad=True)
    owner = list(range(rows))[::-1]
    together = banks.run_together(heads, x, owner)
    single = torch.cat([heads[t](x[i : i + 1]) for i, t in enumerate(owner)])
    torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-5)
    inputs = [x, *(p for head in heads for p in head.parameters())]
    g = torch.randn_like(single)
    found, wanted = (torch.autograd.grad(y, inputs, g, retain_graph=True) for y in (together, single))
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-4, atol=1e-3)


def test_convolutions_of_own_filters_can_be_differentiated_twice():
    torch.manual_seed(0)
    heads = [nn.Conv3d(2, 2, 3, padding=1).double() for _ in range(2)]
    x = torch.randn(2, 2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: banks.run_together(heads, x, [1, 0]).square(), (x,))
