"""From low-rank factors to weights, and from gradients of weights to gradients of factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorkd_monai.errors import LoRKDError

__all__ = ["LAYOUTS", "BranchFilters", "FusedWeights", "delta_weight", "factor_shapes", "fuse"]

LAYOUTS = ("lorkd", "conv")


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
    with torch.autocast(weight.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)
        base = weight.to(dtype).reshape(b.shape[0], a.shape[1])
        return torch.addmm(base, b.to(dtype), a.to(dtype), alpha=scale).view(weight.shape).to(weight.dtype)


class FusedWeights(NamedTuple):
    """W0 + ΔW_p for each expert p that is present. Tensors: W0, then every A_p, then every B_p."""

    scales: tuple[float, ...]
    dtype: torch.dtype

    def build(self, tensors: Sequence[Tensor], p: int) -> Tensor:
        weight, a, b = self._of(tensors, p)
        return fuse(weight, a, b, self.scales[p]).to(self.dtype)

    def add_gradients(
        self, grads: list[Tensor | None], needs: Sequence[bool], tensors: Sequence[Tensor], p: int, g: Tensor
    ) -> None:
        """Carry the gradient ``g`` of the weight of expert p over to W0, A_p and B_p; it may be overwritten."""
        weight, a, b = self._of(tensors, p)
        at_a, at_b = 1 + p, 1 + len(self.scales) + p
        with torch.autocast(g.device.type, enabled=False):
            wide = torch.promote_types(a.dtype, torch.float32)
            g = g.to(wide)
            rows = g.reshape(b.shape[0], a.shape[1])
            if needs[at_a]:
                grads[at_a] = (b.to(wide).t() @ rows).mul_(self.scales[p]).to(a.dtype)
            if needs[at_b]:
                grads[at_b] = (rows @ a.to(wide).t()).mul_(self.scales[p]).to(b.dtype)
            if needs[0]:
                grads[0] = g if grads[0] is None else grads[0].add_(g)

    def _of(self, tensors: Sequence[Tensor], p: int) -> tuple[Tensor, Tensor, Tensor]:
        return tensors[0], tensors[1 + p], tensors[1 + len(self.scales) + p]


class BranchFilters(NamedTuple):
    """The first half of ΔW_p seen as two convolutions: filters of W0's kernel. Tensors: every A_p.

    ΔW_p consists of ``blocks`` row blocks, block q of a filter being B[o·blocks + q] A. So it is a convolution with
    blocks · rows filters, filter (q, j) being A[j] at block q and 0 elsewhere, followed by a 1×1 convolution with
    B seen as o × (blocks · rows). Experts of lower rank than the highest are filled up with zero filters.
    """

    shape: tuple[int, ...]  # of W0
    blocks: int
    rows: int  # of A, the highest present
    dtype: torch.dtype

    def build(self, tensors: Sequence[Tensor], p: int) -> Tensor:
        a = tensors[p]
        filters = a.new_zeros(self.blocks, self.rows, self.blocks, a.shape[1])
        filters[:, : len(a)].diagonal(dim1=0, dim2=2).copy_(a.unsqueeze(-1))
        return filters.view(self.blocks * self.rows, *self.shape[1:]).to(self.dtype)

    def add_gradients(
        self, grads: list[Tensor | None], needs: Sequence[bool], tensors: Sequence[Tensor], p: int, g: Tensor
    ) -> None:
        """Carry the gradient ``g`` of the filters of expert p over to A_p."""
        if needs[p]:
            a = tensors[p]
            blocks = g.reshape(self.blocks, self.rows, self.blocks, a.shape[1])[:, : len(a)]
            grads[p] = blocks.diagonal(dim1=0, dim2=2).sum(-1).to(a.dtype)

    def second(self, factors_b: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
        """scale_p · B_p of every expert as experts × o × (blocks · rows)."""
        matrices = []
        for b, scale in zip(factors_b, scales, strict=True):
            columns = b.shape[1]
            b = (b * scale).to(self.dtype).view(self.shape[0], self.blocks, columns)
            matrices.append(torch.nn.functional.pad(b, (0, self.rows - columns)).flatten(1))
        return torch.stack(matrices)
