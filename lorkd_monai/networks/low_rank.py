"""One layer with a low-rank expert for each task."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks.eks.strategies import LayerOp, eks, factor_shapes, fuse
from lorkd_monai.networks.routing.module import RoutedModule, refuse_direct_calls
from lorkd_monai.networks.routing.table import Routing
from lorkd_monai.networks.spec import layer_rank
from lorkd_monai.networks.weight_facts import READABLE, readable

__all__ = ["LowRankLayer"]


class LowRankLayer(RoutedModule):
    """A convolution, transposed convolution or linear layer with one low-rank expert for each task.

    For a sample of task t the layer computes with the weight W0 + scale_t · (B_t A_t), W0 being the wrapped layer's
    own (shared) weight; the bias is shared. A starts kaiming-uniform (a = √5) and B at 0, so that a fresh layer is the
    wrapped layer (LoRKD, arXiv 2404.17184, eq. 2). Call it inside :func:`route`.

    Args:
        layer: Conv1d/2d/3d, ConvTranspose1d/2d/3d or Linear. It is used, not copied.
        ranks: rank of each task's expert; its length is the number of tasks.
        scale: factor of ΔW, one for all tasks or one for each.
        layout: ``"lorkd"`` or ``"conv"``, see :func:`~lorkd_monai.networks.eks.strategies.factor_shapes`.
        name: name of the layer in its network, for messages.
        rank_factor: rank of this layer's experts relative to their tasks', which counts where experts are cut.

    Raises:
        LoRKDError: a layer of another type, no ranks, a rank below 1, a wrong number of scales, an unknown layout.

    Example::

        >>> layer = LowRankLayer(nn.Conv3d(8, 16, 3, padding=1), ranks=[4, 4, 8], scale=2.0)
        >>> with route([2, 0, 1]):
        ...     layer(torch.rand(3, 8, 12, 12, 12)).shape
        torch.Size([3, 16, 12, 12, 12])
    """

    def __init__(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        scale: float | Sequence[float] = 1.0,
        layout: str = "lorkd",
        name: str = "",
        rank_factor: float = 1.0,
    ) -> None:
        super().__init__(num_tasks=0, name=name)
        if not LayerOp.supports(layer):
            raise LoRKDError(
                f"{self._who()}: expected a convolution, transposed convolution or linear layer of torch, "
                f"got {type(layer).__name__}"
            )
        if isinstance(ranks, (int, float, str)) or len(ranks) == 0:
            raise LoRKDError(f"{self._who()}: ranks must hold one rank for each task, got {ranks!r}")
        scales = [scale] * len(ranks) if isinstance(scale, (int, float)) else list(scale)
        if len(scales) != len(ranks):
            raise LoRKDError(f"{self._who()}: got {len(scales)} scales for {len(ranks)} tasks")
        if layer._forward_hooks or layer._forward_pre_hooks or parametrize.is_parametrized(layer):
            raise LoRKDError(
                f"{self._who()} has forward hooks or a parametrization (weight norm, spectral norm, …), which "
                f"change its weight behind the expert's back: remove them or exclude this layer (exclude=[{name!r}])"
            )
        # This module computes with the layer's weight and never calls the layer: whoever does goes past the experts.
        refuse_direct_calls(layer, self._who())
        self.layer = layer
        self.layout = layout
        self.rank_factor = rank_factor
        self.op = LayerOp(layer)
        self.scales: list[float] = []
        self.lora_A = nn.ParameterList()
        self.lora_B = nn.ParameterList()
        for rank, task_scale in zip(ranks, scales, strict=True):
            self.add_expert(rank, task_scale)

    @property
    def ranks(self) -> list[int]:
        """Rank of each task's expert."""
        return [a.shape[0] // self._blocks for a in self.lora_A]

    @property
    def _blocks(self) -> int:
        """Rows of A, and columns of B, that make one component of an expert."""
        return factor_shapes(self.layer.weight.shape, 1, self.layout)[0][0]

    def add_expert(self, rank: int, scale: float) -> None:
        """Append a fresh expert for one more task."""
        shape_a, shape_b = factor_shapes(self.layer.weight.shape, rank, self.layout)
        a, b = self.layer.weight.new_empty(shape_a), self.layer.weight.new_zeros(shape_b)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        self.lora_A.append(nn.Parameter(a))
        self.lora_B.append(nn.Parameter(b))
        self.scales.append(float(scale))
        self.num_tasks = len(self.lora_A)

    @torch.no_grad()
    def replace_expert(self, task: int, a: Tensor, b: Tensor, scale: float) -> None:
        """Give one task's expert other factors, of any rank; they are copied, in this layer's type and device."""
        for factors, new in ((self.lora_A, a), (self.lora_B, b)):
            old = factors[task]
            factors[task] = nn.Parameter(new.to(old, copy=True), old.requires_grad)
        self.scales[task] = float(scale)

    @torch.compiler.disable  # the routing differs from batch to batch: compiled, each would be compiled again
    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Apply the layer to a batch of mixed tasks; ``output_size`` as in transposed convolutions."""
        kwargs = {} if output_size is None else {"output_size": output_size}
        routing = self.routing(x)
        self._refuse_unbatched(x, routing)
        # Not by index, which costs a ParameterList more than a small layer's arithmetic where there are many tasks.
        factors_a: Sequence[Any] = list(self.lora_A._parameters.values())
        factors_b: Sequence[Any] = list(self.lora_B._parameters.values())
        if routing.ranks is not None:
            cut = [self.factors(t, routing.ranks.get(t)) for t in range(self.num_tasks)]
            factors_a, factors_b = zip(*cut, strict=True)
        return eks(self.op, x, self.layer.weight, self.layer.bias, factors_a, factors_b, self.scales, routing, **kwargs)

    def factors(self, task: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
        """A_t and B_t; with ``rank``, their first components alone, as many as a task of that rank has here.

        See :mod:`~lorkd_monai.experts.nested`.
        """
        a, b = self.lora_A[task], self.lora_B[task]
        if rank is None:
            return a, b
        rows = layer_rank(rank, self.rank_factor) * self._blocks
        return a[:rows], b[:, :rows].contiguous()

    def _refuse_unbatched(self, x: Tensor, routing: Routing) -> None:
        # torch takes an input without batch dimension too: cut into rows, its channels would pass for samples.
        layer = self.layer
        expected = 2 if isinstance(layer, nn.Linear) else 2 + len(layer.kernel_size)
        if routing.uniform is None and (x.ndim < expected if isinstance(layer, nn.Linear) else x.ndim != expected):
            raise LoRKDError(
                f"{self._who()}: a batch of several tasks needs a batch dimension, expected {expected} dimensions, "
                f"got shape {tuple(x.shape)}"
            )

    def fused_weight(self, task: int, rank: int | None = None) -> Tensor:
        """W0 + ΔW_t, as extraction and the forward pass both use it; see :meth:`factors` for ``rank``."""
        return fuse(self.layer.weight, *self.factors(task, rank), self.scales[task])

    @torch.no_grad()
    def plain(self, task: int, memo: dict, rank: int | None = None) -> nn.Module:
        """A layer of the wrapped layer's class with the expert of ``task`` fused into its weight.

        Args:
            task: task index.
            memo: deepcopy memo: tensors found in it are shared instead of copied.
            rank: cut the expert, see :meth:`factors`.
        """
        weight = nn.Parameter(self.fused_weight(task, rank), self.layer.weight.requires_grad)
        layer = copy.deepcopy(self.layer, {**memo, id(self.layer.weight): weight})
        layer._forward_pre_hooks.clear()  # the guard set in __init__; a layer with hooks of its own was refused there
        return layer

    def expert_tensors(self, task: int) -> dict[str, Tensor]:
        """The parameters of one task's expert by name."""
        return {"lora_A": self.lora_A[task], "lora_B": self.lora_B[task]}

    def remove_expert(self, task: int) -> None:
        """Delete the expert of one task; later tasks move up by one."""
        for factors in (self.lora_A, self.lora_B):
            kept = [p for t, p in enumerate(factors) if t != task]
            factors.__init__(kept)  # type: ignore[misc]  # in place, so that it keeps its identity
        del self.scales[task]
        self.num_tasks = len(self.scales)

    def __getattr__(self, item: str) -> Any:
        if item in READABLE:
            refusal = (
                f"{self._who()}: the network computes with its {item} by itself, past the layer, and would leave the "
                f"experts out: exclude this layer (exclude=[{self.name!r}])"
            )
            return readable(super().__getattr__("layer"), item, refusal)
        return super().__getattr__(item)

    def extra_repr(self) -> str:
        return f"ranks={self.ranks}, layout={self.layout!r}"
