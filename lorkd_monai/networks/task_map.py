"""One map over a batch sorted by task, with weights that are made for each task and not kept.

A merged weight is as large as the layer's own. Eight experts would keep eight of them in memory from the forward pass
to the backward pass, in every layer. So an autograd function keeps only what they are made of, and makes them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lorkd_monai.networks.factors import BranchFilters, FusedWeights
from lorkd_monai.networks.operations import ConvMap, LinearMap

__all__ = ["TaskMap"]


@dataclass(frozen=True)
class TaskMap:
    """y[rows of p] = map(x[rows of p], weights.build(tensors, p), bias), for every expert p that is present.

    Args:
        map: the convolution or linear map.
        weights: how the weight of each expert is made of ``tensors``.
        spans: first row and end of each expert's segment.
        pieces: None: one call for each segment ("split"). Otherwise all in one grouped call, the batch being cut into
            so many equal pieces, each within one segment ("group").
    """

    map: ConvMap | LinearMap
    weights: FusedWeights | BranchFilters
    spans: tuple[tuple[int, int], ...]
    pieces: int | None = None

    def __call__(self, x: Tensor, bias: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
        if torch.compiler.is_compiling():  # the compiler decides by itself what to keep
            return self.forward(x, bias, tensors)
        if not torch.is_grad_enabled():
            return self.forward(x, bias, tensors)
        return _Rebuilding.apply(self, x, bias, *tensors)

    @cached_property
    def _owners(self) -> list[int]:
        size = self.spans[-1][1] // self.pieces
        return [p for p, (start, stop) in enumerate(self.spans) for _ in range((stop - start) // size)]

    def _grouped_weights(self, tensors: Sequence[Tensor]) -> Tensor:
        built = [self.weights.build(tensors, p) for p in range(len(self.spans))]
        return self.map.pack_weight(torch.stack([built[p] for p in self._owners]))

    def forward(self, x: Tensor, bias: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
        """The result; with operations that autograd can follow where it records."""
        if self.pieces is not None:
            n = self.pieces
            weight, grouped_bias = self._grouped_weights(tensors), self.map.pack_bias(bias, n)
            return self.map.unpack(self.map.grouped(n)(self.map.pack(x, n), weight, grouped_bias), n, x)
        parts = (
            self.map(x[start:stop], self.weights.build(tensors, p), bias) for p, (start, stop) in enumerate(self.spans)
        )
        return torch.cat(list(parts)) if torch.is_grad_enabled() else _joined(parts, self.spans)

    def backward(
        self, g: Tensor, x: Tensor, tensors: Sequence[Tensor], need_x: bool, needs: Sequence[bool]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of x and of ``tensors``."""
        grads: list[Tensor | None] = [None] * len(tensors)
        need_weights = any(needs)

        def of_segment(p: int, start: int, stop: int) -> Tensor | None:
            weight = self.weights.build(tensors, p)
            part, of_weight = self.map.backward(g[start:stop], x[start:stop], weight, need_x, need_weights)
            if need_weights:
                self.weights.add_gradients(grads, needs, tensors, p, of_weight)
            return part

        if self.pieces is None:
            parts = (of_segment(p, *span) for p, span in enumerate(self.spans))
            if need_x:
                return _joined(parts, self.spans), grads
            for _ in parts:
                pass
            return None, grads
        n = self.pieces
        gx, of_weights = self.map.grouped(n).backward(
            self.map.pack(g, n), self.map.pack(x, n), self._grouped_weights(tensors), need_x, need_weights
        )
        if need_weights:
            of_weights = of_weights.view(n, -1)
            size, shape = x.shape[0] // n, self.weights.build(tensors, 0).shape
            for p, (start, stop) in enumerate(self.spans):
                own = of_weights[start // size : stop // size]
                self.weights.add_gradients(grads, needs, tensors, p, own.sum(0).view(shape))
        return (self.map.unpack(gx, n, x) if need_x else None), grads


def _joined(parts: Sequence[Tensor], spans: Sequence[tuple[int, int]]) -> Tensor:
    """torch.cat of parts that are made one after the other, without holding them all."""
    whole = None
    for part, (start, stop) in zip(parts, spans, strict=True):
        if len(spans) == 1:
            return part
        if whole is None:  # in the memory format of the parts
            whole = part.new_empty_strided((spans[-1][1], *part.shape[1:]), (part[0].numel(), *part.stride()[1:]))
        whole[start:stop] = part
    return whole


class _Rebuilding(torch.autograd.Function):
    """:class:`TaskMap` with weights that are made again in the backward pass."""

    @staticmethod
    def forward(ctx, task_map: TaskMap, x: Tensor, bias: Tensor | None, *tensors: Tensor) -> Tensor:
        ctx.task_map = task_map
        ctx.save_for_backward(x, bias, *tensors)
        y = task_map.forward(x, bias, tensors)
        # Autograd forbids to change a view in place, as activations with inplace=True do; its data are no view.
        return y.data if y._is_view() else y

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, *tensors = ctx.saved_tensors
        _, need_x, need_bias, *needs = ctx.needs_input_grad
        task_map = ctx.task_map
        if torch.is_grad_enabled():  # create_graph=True: by operations that can be differentiated once more
            inputs = [x, bias, *tensors]
            wanted = [i for i, need in enumerate([need_x, need_bias, *needs]) if need]
            y = task_map.forward(x, bias, tensors)
            found = torch.autograd.grad(y, [inputs[i] for i in wanted], g, create_graph=True)
            grads = dict(zip(wanted, found, strict=True))
            return (None, *(grads.get(i) for i in range(len(inputs))))
        gx, grads = task_map.backward(g, x, tensors, need_x, needs)
        grads = [None if grad is None else grad.to(t.dtype) for grad, t in zip(grads, tensors, strict=True)]
        return (None, gx, task_map.map.bias_gradient(g).to(bias.dtype) if need_bias else None, *grads)
