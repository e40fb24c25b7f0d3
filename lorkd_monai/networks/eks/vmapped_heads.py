"""Heads of several tasks in one vectorised call, where one after the other is slow.

A head of its own for each sample means convolutions of one 3D sample, which torch leaves to a slow kernel on the CPU
(see :func:`~lorkd_monai.networks.eks.costs.left_to_slow_kernel`), on the largest maps of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode

from lorkd_monai.networks.eks.costs import falls_to_slow_kernel
from lorkd_monai.networks.routing.rows import take_rows
from lorkd_monai.networks.routing.table import Routing

__all__ = ["can_run_together", "run_together", "slow_one_by_one"]

_DENSE = 64  # output channels of all rows together, up to which every row computes those of all rows
_BLOCK = 16  # channels of all rows together, up to which they are one row's: a kernel computes 16 at once


def slow_one_by_one(x: Tensor, routing: Routing) -> bool:
    """True where rows that go through convolutions singly would be left to torch's slow kernel: 3D, CPU, float32."""
    return (
        x.ndim == 5
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and min(stop - start for _, start, stop in routing.segments) * routing.rounds == 1
        and not torch.is_autocast_enabled("cpu")
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


def run_together(modules: Sequence[nn.Module], x: Tensor, segment_of_row: Sequence[int]) -> Tensor:
    """Row b of ``x`` through ``modules[segment_of_row[b]]``, in one vectorised call; see :func:`can_run_together`."""
    named = [dict(m.named_parameters()) for m in modules]
    parameters = {name: take_rows(torch.stack([n[name] for n in named]), segment_of_row) for name in named[0]}

    def call(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(modules[0], parameters, (row.unsqueeze(0),)).squeeze(0)

    with _ThinConvolutions():
        return vmap(call, randomness="different")(parameters, x)


class _ThinConvolutions(TorchFunctionMode):
    """Have 3D convolutions inside the block vectorised by :class:`_Conv3d`."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv3d and not kwargs and len(args) == 7 and args[-1] == 1:
            return _Conv3d.apply(*args)
        return func(*args, **(kwargs or {}))


class _Conv3d(torch.autograd.Function):
    """A 3D convolution whose vectorised form, for few channels, is one of :class:`_OwnFilters`.

    torch's own form is a grouped convolution, whose kernels are slow where a group has few channels.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        return torch.conv3d(x, weight, bias, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass  # only ever called vectorised, by operations that autograd follows by itself

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> tuple:
        x, weight = (t if dim == 0 else t.movedim(dim, 0) for t, dim in zip((x, weight), in_dims, strict=False))
        bias = bias if bias is None or in_dims[2] == 0 else bias.movedim(in_dims[2], 0)
        rows, channels = weight.shape[:2]
        stride, padding, dilation, _ = options
        x = x.flatten(0, 1)  # each row of the vectorised call is a batch of one
        if rows * channels <= _DENSE and tuple(stride) == (1, 1, 1) and not isinstance(padding, str):
            return _OwnFilters.apply(x, weight, bias, tuple(padding), tuple(dilation)).unsqueeze(1), 0
        return _grouped(x, weight, bias, stride, padding, dilation).unsqueeze(1), 0


class _OwnFilters(torch.autograd.Function):
    """Row b of x (rows × i × space) by its own filters (rows × o × i × kernel), for few channels and stride 1.

    The gradient of x is a convolution too, with mirrored filters, and is computed as one: torch's backward kernel
    takes several times as long where the input has few channels.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], dilation: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.options = padding, dilation
        return _own_filters(x, weight, bias, padding, dilation)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        padding, dilation = ctx.options
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        gx = gw = gb = None
        if torch.is_grad_enabled():  # create_graph=True: by operations that can be differentiated once more
            wanted = [t for t, need in zip((x, weight, bias), (need_x, need_weight, need_bias), strict=True) if need]
            found = iter(
                torch.autograd.grad(_grouped(x, weight, bias, 1, padding, dilation), wanted, g, create_graph=True)
            )
            return *(next(found) if need else None for need in (need_x, need_weight, need_bias)), None, None
        if need_x:
            space = range(3, weight.ndim)
            left = [d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[3:], padding, strict=True)]
            cut = tuple(slice(max(0, -n), g.shape[2 + i] - max(0, -n)) for i, n in enumerate(left))
            mirrored = weight.flip(tuple(space)).transpose(1, 2)
            inner: Any = (..., *cut)
            gx = _own_filters(g[inner], mirrored, None, tuple(max(0, n) for n in left), dilation)
        if need_weight:
            rows = len(x)
            spread = g.new_zeros(rows, *g.shape)
            spread.diagonal(0, 0, 1).copy_(g.movedim(0, -1))
            _, gw, _ = torch.ops.aten.convolution_backward(
                spread.flatten(1, 2), x, weight.flatten(0, 1), None, (1, 1, 1), padding, dilation, False, (0, 0, 0), 1,
                (False, True, False),
            )  # fmt: skip
            gw = gw.view(weight.shape)
        if need_bias:
            gb = g.flatten(2).sum(2)
        return gx, gw, gb, None, None


def _own_filters(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], dilation: tuple[int, ...]
) -> Tensor:
    """See :class:`_OwnFilters`: one dense convolution of many filters, mostly zeros or mostly not looked at."""
    rows, outs, ins = weight.shape[:3]
    bias = None if bias is None else bias.flatten()
    single = (1, rows * ins, *x.shape[2:])
    if rows * max(outs, ins) <= _BLOCK and not falls_to_slow_kernel(single, tuple(weight.shape[3:])):
        filters = weight.new_zeros(rows, outs, rows, ins, *weight.shape[3:])
        filters.diagonal(0, 0, 2).copy_(weight.movedim(0, -1))
        y = torch.conv3d(x.reshape(single), filters.flatten(2, 3).flatten(0, 1), bias, 1, padding, dilation)
        return y.unflatten(1, (rows, outs)).squeeze(0)
    y = torch.conv3d(x, weight.flatten(0, 1), bias, 1, padding, dilation).unflatten(1, (rows, outs))
    return y.diagonal(0, 0, 1).movedim(-1, 0).contiguous()


def _grouped(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    """Row b by its own filters as a grouped convolution of one sample. ``options``: stride, padding, dilation."""
    rows = len(x)
    bias = None if bias is None else bias.flatten()
    y = torch.conv3d(x.flatten(0, 1).unsqueeze(0), weight.flatten(0, 1), bias, *options, rows)  # type: ignore[call-overload]
    return y.unflatten(1, (rows, -1)).squeeze(0)
