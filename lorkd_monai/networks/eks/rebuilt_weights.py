"""One map over a batch ordered by task, with weights that are made for each task and not kept.

A merged weight is as large as the layer's own. Eight experts would keep eight of them in memory from the forward pass
to the backward pass, in every layer. So an autograd function keeps only what they are made of, and makes them again;
but for those that are small beside the layer's input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lorkd_monai.networks.eks.factors import BranchFilters, FusedWeights
from lorkd_monai.networks.eks.layer_maps import ConvMap, LinearMap
from lorkd_monai.networks.routing.rows import join_segments, segment_of_rows, take_rows, take_segment

__all__ = ["TaskMap"]

_TOGETHER = 2**20  # numbers in weights that are made in one go: fewer calls, at 4 MiB of memory


@dataclass(frozen=True)
class TaskMap:
    """y[rows of p] = map(x[rows of p], weights.build(tensors, p), bias), for every expert p that is present.

    Args:
        map: the convolution or linear map.
        weights: how the weight of each expert is made of ``tensors``.
        segments: first row and end of each expert's segment in a round of the batch, see `Routing`.
        rounds: of which the batch consists.
        groups: None: one call for each segment ("split"). Otherwise one grouped call ("group"): each round is cut into
            so many groups of equal size, each within one segment.
    """

    map: ConvMap | LinearMap
    weights: FusedWeights | BranchFilters
    segments: tuple[tuple[int, int], ...]
    rounds: int = 1
    groups: int | None = None

    def __call__(self, x: Tensor, bias: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
        if not torch.is_grad_enabled():
            return self.forward(x, bias, tensors)
        return _Rebuilding.apply(self, x, bias, *tensors)

    @cached_property
    def _segment_of_group(self) -> list[int]:
        """Which segment each group is in."""
        return segment_of_rows(self.segments, size=self.segments[-1][1] // self.groups)  # type: ignore[operator]  # only asked for where there are groups

    def _segment(self, x: Tensor, start: int, stop: int) -> Tensor:
        return take_segment(x, start, stop, self.rounds)

    def _built_together(self, tensors: Sequence[Tensor]) -> list[range]:
        """The experts whose weights are made together: all of them where they are small."""
        largest = max(t.numel() for t in tensors)
        step = max(1, _TOGETHER // largest)
        return [range(p, min(p + step, len(self.segments))) for p in range(0, len(self.segments), step)]

    def build_together(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """All weights, where they are made in one go."""
        if len(self._built_together(tensors)) > 1:
            return None
        return self.weights.build(tensors, range(len(self.segments)))

    def _grouped_weights(self, tensors: Sequence[Tensor], built: Tensor | None) -> Tensor:
        if built is None:
            built = self.weights.build(tensors, range(len(self.segments)))
        if self.groups != len(self.segments):
            built = take_rows(built, self._segment_of_group)
        return self.map.pack_weight(built)

    def _by_segment(
        self, tensors: Sequence[Tensor], kept: Tensor | None
    ) -> Iterator[tuple[range, list[tuple[int, int, Tensor]]]]:
        """Experts whose weights are made together, with first row, end and weight of each."""
        for experts in self._built_together(tensors):
            built = self.weights.build(tensors, experts) if kept is None else kept
            yield experts, [(*self.segments[p], built[i]) for i, p in enumerate(experts)]

    def forward(self, x: Tensor, bias: Tensor | None, tensors: Sequence[Tensor], built: Tensor | None = None) -> Tensor:
        """The result; with operations that autograd can follow where it records. ``built``: of `build_together`."""
        if self.groups is not None:
            n, rounds = self.groups, self.rounds
            weight, grouped_bias = self._grouped_weights(tensors, built), self.map.pack_bias(bias, n)
            y = self.map.grouped(n)(self.map.pack(x, n, rounds), weight, grouped_bias)
            return self.map.unpack(y, n, rounds, x)
        parts = (
            self.map(self._segment(x, start, stop), weight, bias)
            for _, segments in self._by_segment(tensors, built)
            for start, stop, weight in segments
        )
        return join_segments(list(parts), self.rounds) if torch.is_grad_enabled() else self._joined(parts)

    def backward(
        self,
        g: Tensor,
        x: Tensor,
        tensors: Sequence[Tensor],
        built: Tensor | None,
        needs: tuple[bool, bool, Sequence[bool]],
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
        """Gradients of x, of the bias and of ``tensors``, where ``needs`` asks for them."""
        need_x, need_bias, need_tensors = needs
        wanted = (need_x, any(need_tensors), need_bias)
        grads: list[Tensor | None] = [None] * len(tensors)
        of_bias: list[Tensor] = []
        if self.groups is not None:
            n, rounds, count = self.groups, self.rounds, len(self.segments)
            weights = self._grouped_weights(tensors, built)
            packed = self.map.pack(g, n, rounds), self.map.pack(x, n, rounds)
            gx, of_groups, gb = self.map.grouped(n).backward(*packed, weights, wanted)
            if of_groups is not None:
                of_groups = of_groups.view(n, -1)
                if n != count:
                    segment = torch.tensor(self._segment_of_group, device=x.device)
                    of_groups = of_groups.new_zeros(count, of_groups.shape[1]).index_add_(0, segment, of_groups)
                self.weights.add_gradients(grads, need_tensors, tensors, range(count), of_groups)
            # No view of what the convolution gave: autograd adds to a gradient in place where nobody else holds it.
            gx = self.map.unpack(gx, n, rounds, x).data if need_x else None
            return gx, gb.view(n, -1).sum(0) if need_bias else None, grads

        def parts() -> Iterator[Any]:
            for experts, segments in self._by_segment(tensors, built):
                of_weights = []
                for start, stop, weight in segments:
                    rows = self._segment(g, start, stop), self._segment(x, start, stop)
                    part, of_weight, gb = self.map.backward(*rows, weight, wanted)
                    of_weights.append(of_weight)
                    of_bias.append(gb)
                    yield part
                if wanted[1]:
                    together = of_weights[0].unsqueeze(0) if len(experts) == 1 else torch.stack(of_weights)
                    self.weights.add_gradients(grads, need_tensors, tensors, experts, together)

        gx = self._joined(parts()) if need_x else [None for _ in parts()][0]
        return gx, torch.stack(of_bias).sum(0) if need_bias else None, grads

    def _joined(self, parts: Iterable[Tensor]) -> Tensor:
        """`join_segments` of parts that are made one after the other, without holding them all."""
        whole: Any = None
        for part, (start, stop) in zip(parts, self.segments, strict=True):
            if len(self.segments) == 1:
                whole = part
                continue  # not a return: what makes the parts has work left after the last one
            if whole is None:  # in the memory format of the parts
                rows, (numbers, *strides) = self.segments[-1][1] * self.rounds, (part[0].numel(), *part.stride()[1:])
                whole = part.new_empty_strided((rows, *part.shape[1:]), (numbers, *strides))
            whole.unflatten(0, (self.rounds, -1))[:, start:stop] = part.unflatten(0, (self.rounds, -1))
        return whole


class _Rebuilding(torch.autograd.Function):
    """:class:`TaskMap` with weights that are made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, task_map: TaskMap, x: Tensor, bias: Tensor | None, *tensors: Tensor) -> Tensor:
        built = task_map.build_together(tensors)
        ctx.task_map = task_map
        small = built is not None and 4 * built.numel() <= x.numel()  # beside the input, which is kept anyway
        ctx.save_for_backward(x, bias, built if small else None, *tensors)
        y = task_map.forward(x, bias, tensors, built)
        # Autograd forbids to change a view in place, as activations with inplace=True do; its data are no view.
        return y.data if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, built, *tensors = ctx.saved_tensors
        _, need_x, need_bias, *needs = ctx.needs_input_grad
        task_map = ctx.task_map
        if torch.is_grad_enabled():  # create_graph=True: by operations that can be differentiated once more
            inputs = [x, bias, *tensors]
            wanted = [i for i, need in enumerate([need_x, need_bias, *needs]) if need]
            y = task_map.forward(x, bias, tensors)
            found = torch.autograd.grad(y, [inputs[i] for i in wanted], g, create_graph=True)
            by_input = dict(zip(wanted, found, strict=True))
            return (None, *(by_input.get(i) for i in range(len(inputs))))
        gx, of_bias, grads = task_map.backward(g, x, tensors, built, (need_x, need_bias, needs))
        grads = [
            grad if grad is None or grad.dtype == t.dtype else grad.to(t.dtype)
            for grad, t in zip(grads, tensors, strict=True)
        ]
        return (None, gx, None if of_bias is None else of_bias.to(bias.dtype), *grads)
