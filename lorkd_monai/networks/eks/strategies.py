"""The efficient knowledge separation (EKS) operation: one layer, one batch, many tasks.

Semantics: for each sample b of task t(b)::

    y_b = op(x_b, W0 + ΔW_t(b), bias)        ΔW_t = scale_t · (B_t A_t) viewed as W0's shape

where ``op`` is the convolution, transposed convolution or linear map of the wrapped layer (LoRKD, arXiv 2404.17184,
section 3.2). Three strategies do it; each equals that loop over samples, and none does anything for an expert that is
absent from the batch:

* ``"split"``, the reference: the batch is ordered by task, and each segment is passed through the layer with W0 + ΔW_t;
* ``"group"``: one convolution with a group for each part of the batch with one task;
* ``"factored"``: one dense convolution with W0 for the whole batch, and ΔW_t as two small maps beside it.

Neither of them keeps merged weights for the backward pass. :mod:`~lorkd_monai.networks.eks.costs` chooses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from lorkd_monai.networks.eks import costs
from lorkd_monai.networks.eks.costs import eks_strategy
from lorkd_monai.networks.eks.factors import LAYOUTS, BranchFilters, FusedWeights, delta_weight, factor_shapes, fuse
from lorkd_monai.networks.eks.layer_maps import ConvMap, LayerOp, LinearMap
from lorkd_monai.networks.eks.rebuilt_weights import TaskMap
from lorkd_monai.networks.routing.rows import segment_of_rows, take_rows
from lorkd_monai.networks.routing.table import Routing

__all__ = ["LAYOUTS", "LayerOp", "delta_weight", "eks", "eks_strategy", "factor_shapes", "fuse"]

_GROUP_MULTIPLE = 16  # filters of a group; other numbers make a grouped convolution on the CPU up to twice as slow


def eks(
    op: LayerOp,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors_a: Sequence[Tensor],
    factors_b: Sequence[Tensor],
    scales: Sequence[float],
    routing: Routing,
    **kwargs: Any,
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
    forced = costs.wanted() == "factored" and op.batched(x)
    if routing.uniform is not None and not forced and (not torch.is_grad_enabled() or not op.batched(x)):
        t = routing.uniform
        return op(x, fuse(weight, factors_a[t], factors_b[t], scales[t]), bias, **kwargs)
    if routing.uniform is None and not routing.rounds:
        rows, ordered = take_rows(x, routing.order), routing.ordered
        y = eks(op, rows, weight, bias, factors_a, factors_b, scales, ordered, **kwargs)
        return take_rows(y, routing.inverse)
    x = _autocast(x)
    x, layer_map = op.resolve(x, **kwargs)
    call = _Call(x, layer_map, weight, None if bias is None else bias.to(x.dtype))
    if routing.uniform is not None:
        call.present, call.segments = (routing.uniform,), ((0, x.shape[0]),)
    else:
        call.present = routing.present
        call.segments, call.rounds = tuple((s.start, s.stop) for s in routing.segments), routing.rounds
    call.a = [factors_a[t] for t in call.present]
    call.b = [factors_b[t] for t in call.present]
    call.scales = tuple(scales[t] for t in call.present)
    return call.run(call.strategy())


def _autocast(x: Tensor) -> Tensor:
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


class _Call:
    """One layer applied to one ordered batch: the experts present and their rows, and each strategy."""

    present: tuple[int, ...]
    segments: tuple[tuple[int, int], ...]  # in a round
    rounds: int = 1
    a: list[Tensor]
    b: list[Tensor]
    scales: tuple[float, ...]

    def __init__(self, x: Tensor, layer_map: ConvMap | LinearMap, weight: Tensor, bias: Tensor | None) -> None:
        self.x, self.map, self.weight, self.bias = x, layer_map, weight, bias

    def run(self, strategy: str) -> Tensor:
        if strategy == "factored" and self._can_factor:
            return self._factored()
        weights = FusedWeights(self.scales, self.x.dtype)
        groups = self._situation.groups if strategy == "group" else None
        task_map = TaskMap(self.map, weights, self.segments, self.rounds, groups)
        return task_map(self.x, self.bias, [self.weight, *self.a, *self.b])

    def strategy(self) -> str:
        """The strategy to take: forced or chosen."""
        wanted = costs.wanted()
        if len(self.segments) == 1 and wanted != "factored":
            return "split"  # merged once: nothing to gain
        return costs.choose(self._situation) if wanted == "auto" else wanted

    @property
    def _can_factor(self) -> bool:
        # A transposed convolution would need the small map first and, with groups, every group its own filters.
        return isinstance(self.map, LinearMap) or (self.map.groups == 1 and not self.map.transposed)

    @property
    def _blocks(self) -> int:
        return self.b[0].shape[0] // self.weight.shape[0]

    @cached_property
    def _rows(self) -> int:
        return max(a.shape[0] for a in self.a)

    @cached_property
    def _situation(self) -> costs.Situation:
        sizes = tuple((stop - start) * self.rounds for start, stop in self.segments)
        branch_rows = self._rows * self._blocks if self._can_factor else 0
        return _situation(
            self.map, self.x.device.type, tuple(self.x.shape), tuple(self.weight.shape), sizes, self.rounds, branch_rows
        )

    def _factored(self) -> Tensor:
        x, dtype, channels_last = self.x, self.x.dtype, isinstance(self.map, LinearMap)
        form = costs.branch_form(self._situation)
        multiple = _GROUP_MULTIPLE if form == "group" and not channels_last else 1
        filters = BranchFilters(tuple(self.weight.shape), self._blocks, self._rows, dtype, multiple)
        segment_of_row = segment_of_rows(self.segments, self.rounds)
        if form == "unfold":
            h = filters.unfolded(self.a, segment_of_row, self.map.unfold(x, tuple(self.weight.shape[2:])))  # type: ignore[union-attr]
        else:
            groups = self._situation.groups if form == "group" else None
            h = TaskMap(self.map, filters, self.segments, self.rounds, groups)(x, None, self.a)
        y = self.map(x, self.weight.to(dtype), self.bias)
        second = take_rows(filters.second(self.b, self.scales), segment_of_row)  # rows × o × filters
        if form == "unfold":
            h = h.view(len(x), -1, *y.shape[2:])
        if not channels_last and not y.is_contiguous():  # a channels_last memory format, which is kept
            y, h = y.movedim(1, -1), h.movedim(1, -1)
            return self._add(y, h, second).movedim(-1, 1)
        if channels_last:
            return self._add(y, h, second)
        return torch.baddbmm(y.flatten(2), second, h.flatten(2)).view(y.shape)

    @staticmethod
    def _add(y: Tensor, h: Tensor, second: Tensor) -> Tensor:
        rows = y.shape[0]
        added = torch.baddbmm(
            y.reshape(rows, -1, y.shape[-1]), h.reshape(rows, -1, h.shape[-1]), second.transpose(1, 2)
        )
        return added.view(y.shape)


@lru_cache(maxsize=4096)
def _situation(
    layer_map: ConvMap | LinearMap,
    device: str,
    shape: tuple[int, ...],
    weight: tuple[int, ...],
    sizes: tuple[int, ...],
    rounds: int,
    branch_rows: int,
) -> costs.Situation:
    """What the choice of a strategy depends on.

    Args:
        layer_map: the layer's map.
        device: kind of device.
        shape: of the input.
        weight: shape of W0.
        sizes: rows of each segment, in all rounds.
        rounds: of the batch.
        branch_rows: filters of the low-rank branch; 0 where ΔW can't be written as two maps.
    """
    numbers = math.prod(weight)
    branch = numbers // weight[0] * branch_rows
    slow, unfolded = "", 0
    if isinstance(layer_map, LinearMap):
        rows = math.prod(shape[:-1])
        positions, channels, moved = rows // shape[0], min(weight), rows * (weight[0] + weight[1])
    else:
        inputs, stride, kernel = math.prod(shape[2:]), math.prod(layer_map.stride), weight[2:]
        outputs = inputs * stride if layer_map.transposed else max(1, inputs // stride)
        out_channels = weight[1] * layer_map.groups if layer_map.transposed else weight[0]
        positions = inputs if layer_map.transposed else outputs
        moved = math.prod(shape) + shape[0] * outputs * out_channels
        channels = min(weight[0] // layer_map.groups, weight[1])
        if len(kernel) == 2 and branch_rows:
            unfolded = shape[0] * positions * numbers // weight[0]
        if costs.left_to_slow_kernel(device, shape, kernel, layer_map.groups):
            slow = "strided" if stride > 1 or layer_map.transposed else "plain"
    return costs.Situation(device, sizes, positions, numbers, moved, branch, channels, unfolded, slow, rounds)
