"""The efficient knowledge separation (EKS) operation: one layer, one batch, many tasks.

Semantics: for each sample b of task t(b)::

    y_b = op(x_b, W0 + ΔW_t(b), bias)        ΔW_t = scale_t · (B_t A_t) viewed as W0's shape

where ``op`` is the convolution, transposed convolution or linear map of the wrapped layer (LoRKD, arXiv 2404.17184,
section 3.2). Every strategy in this file must equal that loop over samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks.routing import Routing, take_rows

__all__ = ["LAYOUTS", "LayerOp", "delta_weight", "eks", "factor_shapes", "fuse"]

LAYOUTS = ("lorkd", "conv")

_CONV = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_CONV_TRANSPOSE = {
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}


@dataclass(frozen=True)
class LayerOp:
    """The operation of one layer with the weight left open, equal to the layer's own forward to the last bit."""

    layer: nn.Module

    @staticmethod
    def supports(layer: nn.Module) -> bool:
        """True for convolutions, transposed convolutions and linear layers whose forward is torch's own."""
        for base in (*_CONV, *_CONV_TRANSPOSE, nn.Linear):
            if isinstance(layer, base):
                own = type(layer).forward is base.forward
                return own and getattr(type(layer), "_conv_forward", None) is getattr(base, "_conv_forward", None)
        return False

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, bias)
        for base, transpose in _CONV_TRANSPOSE.items():
            if isinstance(layer, base):
                nd = len(layer.kernel_size)
                padding = layer._output_padding(
                    x, output_size, layer.stride, layer.padding, layer.kernel_size, nd, layer.dilation
                )
                return transpose(x, weight, bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation)
        return layer._conv_forward(x, weight, bias)


def factor_shapes(
    weight_shape: Sequence[int], rank: int, layout: str = "lorkd"
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of (A, B) for a weight of shape (o, i, k0, k1, …).

    ``"lorkd"`` is the papers' layout: A is (r·k0) × (i·k0·k1·…/k0) and B is (o·k0) × (r·k0). For square kernels these
    are the authors' shapes (2D: A rk × ik, B ok × rk; 3D: A rk × ik², B ok × rk). Note that "rank r" there allows an
    effective rank of up to r·k0² of the weight seen as an o × (i·k0·k1·…) matrix. ``"conv"`` is a convolution with r
    filters followed by a 1×1 convolution: A is r × (i·k0·k1·…), B is o × r.

    Raises:
        LoRKDError: unknown layout, or a rank below 1.
    """
    if layout not in LAYOUTS:
        raise LoRKDError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise LoRKDError(f"rank must be an integer of at least 1, got {rank!r}")
    out, columns = weight_shape[0], 1
    for size in weight_shape[1:]:
        columns *= size
    blocks = weight_shape[2] if layout == "lorkd" and len(weight_shape) > 2 else 1
    return (rank * blocks, columns // blocks), (out * blocks, rank * blocks)


def delta_weight(a: Tensor, b: Tensor, scale: float, shape: Sequence[int]) -> Tensor:
    """ΔW = scale · (B A) viewed as ``shape``, in float32 or wider whatever autocast says."""
    with torch.autocast(a.device.type, enabled=False):
        dtype = torch.promote_types(a.dtype, torch.float32)
        return (b.to(dtype) @ a.to(dtype)).mul(scale).view(tuple(shape))


def fuse(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W0 + ΔW, added in float32 or wider and rounded once to the weight's own dtype (parameter fusion)."""
    delta = delta_weight(a, b, scale, weight.shape)
    return (weight.to(delta.dtype) + delta).to(weight.dtype)


def eks(
    op: LayerOp,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors_a: Sequence[Tensor],
    factors_b: Sequence[Tensor],
    scales: Sequence[float],
    routing: Routing,
    **kwargs: object,
) -> Tensor:
    """Apply one layer to a batch of mixed tasks; see the module's docstring for the semantics.

    Args:
        op: the wrapped layer's operation.
        x: input with one row for each entry of ``routing`` in dim 0.
        weight: W0.
        bias: shared bias or None.
        factors_a: A_t of every task.
        factors_b: B_t of every task.
        scales: scale of every task.
        routing: the task of each row; any order.
        kwargs: further arguments of the layer (``output_size`` of transposed convolutions).
    """
    if routing.uniform is not None:
        t = routing.uniform
        return op(x, fuse(weight, factors_a[t], factors_b[t], scales[t]), bias, **kwargs)
    if not routing.is_sorted:
        y = eks(op, take_rows(x, routing.order), weight, bias, factors_a, factors_b, scales, routing.sorted, **kwargs)
        return take_rows(y, routing.inverse)
    return torch.cat(
        [
            op(x[start:stop], fuse(weight, factors_a[t], factors_b[t], scales[t]), bias, **kwargs)
            for t, start, stop in routing.segments
        ]
    )
