"""Heads of several tasks in one vectorised call, where one after the other is slow.

A head of its own for each sample means convolutions of one 3D sample, which torch leaves to a slow kernel on the CPU
(see :func:`~lorkd_monai.networks.dispatch.left_to_slow_kernel`), on the largest maps of the network.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode

from lorkd_monai.networks.routing import Routing, take_rows

__all__ = ["can_run_together", "run_together", "slow_one_by_one"]

_DENSE = 64  # output channels of all rows together, up to which every row computes those of all rows


def slow_one_by_one(x: Tensor, routing: Routing) -> bool:
    """True where rows that go through convolutions singly would be left to torch's slow kernel: 3D, CPU, float32."""
    return (
        x.ndim == 5
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and min(stop - start for _, start, stop in routing.segments) == 1
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def can_run_together(modules: Sequence[nn.Module]) -> bool:
    """True where modules differ in the values of their parameters alone, and calling them changes nothing in them."""

    def form(module: nn.Module) -> tuple:
        return repr(module), [(name, p.shape) for name, p in module.named_parameters()]

    first = form(modules[0])
    return all(form(m) == first for m in modules) and not any(
        any(True for _ in m.buffers()) or any(c._forward_hooks or c._forward_pre_hooks for c in m.modules())
        for m in modules
    )


def run_together(modules: Sequence[nn.Module], x: Tensor, owner: Sequence[int]) -> Tensor:
    """Row b of ``x`` through ``modules[owner[b]]``, all in one vectorised call; see :func:`can_run_together`."""
    named = [dict(m.named_parameters()) for m in modules]
    parameters = {name: take_rows(torch.stack([n[name] for n in named]), owner) for name in named[0]}

    def call(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(modules[0], parameters, (row.unsqueeze(0),)).squeeze(0)

    with _ThinConvolutions():
        return vmap(call, randomness="different")(parameters, x)


class _ThinConvolutions(TorchFunctionMode):
    """Have 3D convolutions inside the block vectorised by :class:`_Conv3d`."""

    def __torch_function__(self, func, types, args=(), kwargs=None) -> object:
        if func is torch.conv3d and not kwargs and len(args) == 7 and args[-1] == 1:
            return _Conv3d.apply(*args)
        return func(*args, **(kwargs or {}))


class _Conv3d(torch.autograd.Function):
    """A 3D convolution whose vectorised form, for few output channels, computes every row's filters on every row.

    torch's own form is a grouped convolution. With a few channels in a group its kernels take several times as long
    as one dense convolution, whose cost hardly grows up to 16 output channels.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *options: object) -> Tensor:
        return torch.conv3d(x, weight, bias, *options)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        pass  # only ever called vectorised, by operations that autograd follows by itself

    @staticmethod
    def vmap(info, in_dims: tuple, x: Tensor, weight: Tensor, bias: Tensor | None, *options: object) -> tuple:
        x, weight = (t if dim == 0 else t.movedim(dim, 0) for t, dim in zip((x, weight), in_dims, strict=False))
        bias = bias if bias is None or in_dims[2] == 0 else bias.movedim(in_dims[2], 0)
        rows, channels = weight.shape[:2]
        *sizes, groups = options
        if rows * channels > _DENSE:
            x, groups = x.transpose(0, 1).flatten(1, 2), rows
        else:
            x = x.flatten(0, 1)
        y = torch.conv3d(x, weight.flatten(0, 1), None if bias is None else bias.flatten(), *sizes, groups)
        y = y.unflatten(1, (rows, channels))
        if groups > 1:
            return y.transpose(0, 1), 0
        each = torch.arange(rows, device=y.device)
        return y[each, each].unsqueeze(1), 0
