"""From low-rank factors to weights, and from gradients of weights to gradients of factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorkd_monai.checks import check_whole
from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks.routing.rows import take_rows

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
    check_whole("rank", rank)
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


def _stack(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Factors of several experts in one tensor; those of lower rank are filled up with zeros."""
    if len({f.shape for f in factors}) == 1:
        return torch.stack(list(factors)).to(dtype)
    rows, columns = (max(f.shape[d] for f in factors) for d in (0, 1))
    return torch.stack(
        [
            f if f.shape == (rows, columns) else torch.nn.functional.pad(f, (0, columns - f.shape[1], 0, rows - len(f)))
            for f in factors
        ]
    ).to(dtype)


def _unstack(stacked: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Undo :func:`_stack` for gradients of factors: parts of the shapes of ``like``."""
    parts = stacked.unbind(0)
    return [p if p.shape == f.shape else p[: len(f), : f.shape[1]] for p, f in zip(parts, like, strict=True)]


class FusedWeights(NamedTuple):
    """W0 + ΔW_p for the experts p that are present. Tensors: W0, then every A_p, then every B_p."""

    scales: tuple[float, ...]
    dtype: torch.dtype

    def build(self, tensors: Sequence[Tensor], experts: range) -> Tensor:
        """Weights of the experts in ``experts``: experts × W0's shape."""
        weight, a, b = self._of(tensors, experts)
        if len(experts) == 1:
            return fuse(weight, a[0], b[0], self.scales[experts[0]]).to(self.dtype).unsqueeze(0)
        with torch.autocast(weight.device.type, enabled=False):
            wide = self._wide(weight, a)
            all_a, (all_b, alpha) = _stack(a, wide), self._scaled(_stack(b, wide), experts)
            base = weight.to(wide).reshape(1, all_b.shape[1], all_a.shape[2])
            fused = torch.baddbmm(base, all_b, all_a, alpha=alpha).view(len(experts), *weight.shape)
        return fused.to(weight.dtype).to(self.dtype)

    def add_gradients(
        self, grads: list[Tensor | None], needs: Sequence[bool], tensors: Sequence[Tensor], experts: range, g: Tensor
    ) -> None:
        """Carry the gradient ``g`` of what :meth:`build` gave over to W0 and the factors; it may be overwritten."""
        weight, factors_a, factors_b = self._of(tensors, experts)
        with torch.autocast(g.device.type, enabled=False):
            wide = self._wide(weight, factors_a)
            g = g.to(wide)
            a = _stack(factors_a, wide)
            b, alpha = self._scaled(_stack(factors_b, wide), experts)
            rows = g.reshape(len(experts), b.shape[1], a.shape[2])
            of_a = torch.bmm(b.transpose(1, 2), rows).mul_(alpha)
            of_b, alpha = self._scaled(torch.bmm(rows, a.transpose(1, 2)), experts)
            of_b.mul_(alpha)
            first = 1 + experts.start
            for at, found in (
                (first, _unstack(of_a, factors_a)),
                (first + len(self.scales), _unstack(of_b, factors_b)),
            ):
                for i, grad in enumerate(found, at):
                    grads[i] = grad if needs[i] else None
            if needs[0]:
                g = (g[0] if len(experts) == 1 else g.sum(0)).reshape(weight.shape)
                grads[0] = g if grads[0] is None else grads[0].add_(g)

    def _of(self, tensors: Sequence[Tensor], experts: range) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
        weight, *factors = tensors
        a, b = factors[: len(self.scales)], factors[len(self.scales) :]
        return weight, a[experts.start : experts.stop], b[experts.start : experts.stop]

    @staticmethod
    def _wide(weight: Tensor, factors_a: Sequence[Tensor]) -> torch.dtype:
        return torch.promote_types(torch.promote_types(weight.dtype, factors_a[0].dtype), torch.float32)

    def _scaled(self, x: Tensor, experts: range) -> tuple[Tensor, float]:
        """``x`` and the factor that is left to apply: the experts' scales, where they are all the same."""
        scales = self.scales[experts.start : experts.stop]
        if len(set(scales)) == 1:
            return x, scales[0]
        return x * x.new_tensor(scales).view(-1, 1, 1), 1.0


class BranchFilters(NamedTuple):
    """The first half of ΔW_p seen as two convolutions: filters of W0's kernel. Tensors: every A_p.

    ΔW_p consists of ``blocks`` row blocks, block q of a filter being B[o·blocks + q] A. So it is a convolution with
    blocks · rows filters, filter (q, j) being A[j] at block q and 0 elsewhere, followed by a 1×1 convolution with
    B seen as o × (blocks · rows). Lower-rank experts are zero-padded; the filter count is rounded up to the
    multiple the kernel prefers.
    """

    shape: tuple[int, ...]  # of W0
    blocks: int
    rows: int  # of A, the highest present
    dtype: torch.dtype
    multiple: int = 1

    @property
    def count(self) -> int:  # type: ignore[override]  # a tuple's own is not used
        """Filters of each expert."""
        return math.ceil(self.blocks * self.rows / self.multiple) * self.multiple

    def _as_blocks(self, filters: Tensor) -> Tensor:
        """The filters without those that only fill up, as a view: experts × blocks × rows × blocks × numbers."""
        used = filters.view(len(filters), self.count, self.blocks, -1)[:, : self.blocks * self.rows]
        return used.unflatten(1, (self.blocks, self.rows))

    def build(self, tensors: Sequence[Tensor], experts: range) -> Tensor:
        """Filters of the experts in ``experts``: experts × filters × in × kernel."""
        a = _stack(tensors[experts.start : experts.stop], self.dtype)
        filters = a.new_zeros(len(experts), self.count, *self.shape[1:])
        self._as_blocks(filters)[:, :, : a.shape[1]].diagonal(dim1=1, dim2=3).copy_(a.unsqueeze(-1))
        return filters

    def add_gradients(
        self, grads: list[Tensor | None], needs: Sequence[bool], tensors: Sequence[Tensor], experts: range, g: Tensor
    ) -> None:
        """Carry the gradient ``g`` of what :meth:`build` gave over to the factors."""
        g = g.reshape(len(experts), self.count, *self.shape[1:])
        of_a = self._as_blocks(g).diagonal(dim1=1, dim2=3).sum(-1)
        for p, grad in zip(experts, _unstack(of_a, tensors[experts.start : experts.stop]), strict=True):
            grads[p] = grad if needs[p] else None

    def unfolded(self, factors_a: Sequence[Tensor], segment_of_row: Sequence[int], windows: Tensor) -> Tensor:
        """What the filters give, rows × filters × positions, without making them.

        Args:
            factors_a: every A_p.
            segment_of_row: the expert of each row.
            windows: the input unfolded, rows × numbers of a filter × positions.
        """
        a = take_rows(_stack(factors_a, self.dtype), segment_of_row)
        windows = windows.view(len(a), self.blocks, a.shape[2], -1)
        parts = [torch.bmm(a, windows[:, q]) for q in range(self.blocks)]
        return torch.stack(parts, 1).flatten(1, 2)

    def second(self, factors_b: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
        """scale_p · B_p of every expert as experts × o × filters."""
        b = _stack(factors_b, self.dtype) * factors_b[0].new_tensor(scales, dtype=self.dtype).view(-1, 1, 1)
        b = b.view(len(b), self.shape[0], self.blocks, -1)
        b = torch.nn.functional.pad(b, (0, self.rows - b.shape[-1])).flatten(2)
        return torch.nn.functional.pad(b, (0, self.count - b.shape[-1]))
