"""What a layer computes, with its weight left open: the convolution or linear map, its gradients, its grouped form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

__all__ = ["ConvMap", "LayerOp", "LinearMap"]

Gradients = tuple[Any, Any, Any]  # a tensor each; None where it was not asked for

_CONV: dict[type[_ConvNd], Callable[..., Tensor]] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_CONV_TRANSPOSE: dict[type[_ConvTransposeNd], Callable[..., Tensor]] = {
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}
LAYERS: tuple[type[Any], ...] = (*_CONV, *_CONV_TRANSPOSE, nn.Linear)

Layer = nn.Linear | _ConvNd


@dataclass(frozen=True)
class LayerOp:
    """The operation of one layer with the weight left open, equal to the layer's own forward to the last bit."""

    layer: Layer

    @staticmethod
    def supports(layer: nn.Module) -> TypeGuard[Layer]:
        """True for convolutions, transposed convolutions and linear layers whose forward is torch's own."""
        for base in LAYERS:
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
                padding = self._output_padding(layer, x, output_size)
                return transpose(x, weight, bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation)
        return layer._conv_forward(x, weight, bias)

    def batched(self, x: Tensor) -> bool:
        """True where ``x`` has a batch dimension."""
        return x.ndim > 1 if isinstance(self.layer, nn.Linear) else x.ndim == 2 + len(self.layer.kernel_size)

    def resolve(self, x: Tensor, output_size: list[int] | None = None) -> tuple[Tensor, ConvMap | LinearMap]:
        """The input with all padding that is not plain zeros applied, and the map that is then left to do."""
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return x, LinearMap()
        output_padding: tuple[int, ...] = (0,) * len(layer.kernel_size)
        if isinstance(layer, _ConvTransposeNd):
            padding: Any = layer.padding
            output_padding = tuple(self._output_padding(layer, x, output_size))
        else:
            x, padding = self._padded(layer, x)
        return x, ConvMap(layer.stride, padding, layer.dilation, layer.transposed, output_padding, layer.groups)

    @staticmethod
    def _output_padding(layer: Any, x: Tensor, output_size: list[int] | None) -> list[int]:
        dims = len(layer.kernel_size)
        return layer._output_padding(
            x, output_size, layer.stride, layer.padding, layer.kernel_size, dims, layer.dilation
        )

    @staticmethod
    def _padded(layer: _ConvNd, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        none = (0,) * len(layer.kernel_size)
        if layer.padding_mode != "zeros":
            return F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), none
        if layer.padding == "valid":
            return x, none
        if layer.padding == "same":
            total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size)]
            if any(t % 2 for t in total):  # an even kernel: one more on the right
                x = F.pad(x, [n for t in reversed(total) for n in (0, t % 2)])
            return x, tuple(t // 2 for t in total)
        return x, layer.padding  # type: ignore[return-value]  # numbers: the words are dealt with above


class ConvMap(NamedTuple):
    """A convolution or transposed convolution with zero padding; the fields are the arguments of torch.convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.convolution(x, weight, bias, *self)

    def backward(self, g: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]) -> Gradients:
        """Gradients of input, weight and bias, where ``needs`` asks for them."""
        return torch.ops.aten.convolution_backward(g, x, weight, [g.shape[1]], *self, needs)

    def unfold(self, x: Tensor, kernel: tuple[int, ...]) -> Tensor:
        """The windows of a 2D convolution: rows × (channels · kernel) × positions."""
        return F.unfold(x, kernel, self.dilation, self.padding, self.stride)

    # The grouped form: one call for a batch whose rounds are cut into groups of equal size, each with its own weight.
    # The groups become channels, in a batch that holds one row of each group. Where a group has one row in each round,
    # the data has this layout already.

    def grouped(self, groups: int) -> ConvMap:
        return self._replace(groups=self.groups * groups)

    def pack(self, x: Tensor, groups: int, rounds: int = 1) -> Tensor:
        rows, (channels, *space) = x.shape[0] // groups, x.shape[1:]
        side_by_side = x.reshape(rounds, groups, rows // rounds, channels, *space).transpose(1, 2)
        # Through one dimension, so that dims of size 1 get plain strides too: torch's backward takes odd ones for
        # channels_last and refuses its own gradient of the weight.
        return side_by_side.reshape(-1).view(rows, groups * channels, *space)

    def unpack(self, y: Tensor, groups: int, rounds: int, like: Tensor) -> Tensor:
        """Undo :meth:`pack`; ``like`` is any tensor with the rows that are wanted."""
        rows, channels, *space = y.shape
        one_by_one = y.reshape(rounds, rows // rounds, groups, channels // groups, *space).transpose(1, 2)
        return one_by_one.reshape(rows * groups, channels // groups, *space)

    def pack_weight(self, weights: Tensor) -> Tensor:
        """Weights of shape groups × … as one weight of the grouped form."""
        return weights.flatten(0, 1)

    def pack_bias(self, bias: Tensor | None, groups: int) -> Tensor | None:
        return None if bias is None else bias.repeat(groups)


@dataclass(frozen=True)
class LinearMap:
    """A linear map of the last dimension."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def backward(self, g: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]) -> Gradients:
        """Gradients of input, weight and bias, where ``needs`` asks for them."""
        return (
            g @ weight if needs[0] else None,
            g.flatten(0, -2).t() @ x.flatten(0, -2) if needs[1] else None,
            g.flatten(0, -2).sum(0) if needs[2] else None,
        )

    def grouped(self, groups: int) -> _BatchedLinearMap:
        return _BatchedLinearMap()

    def pack(self, x: Tensor, groups: int, rounds: int = 1) -> Tensor:
        return x.reshape(rounds, groups, -1, x.shape[-1]).transpose(0, 1).reshape(groups, -1, x.shape[-1])

    def unpack(self, y: Tensor, groups: int, rounds: int, like: Tensor) -> Tensor:
        one_by_one = y.reshape(groups, rounds, -1, y.shape[-1]).transpose(0, 1)
        return one_by_one.reshape(*like.shape[:-1], y.shape[-1])

    def pack_weight(self, weights: Tensor) -> Tensor:
        return weights

    def pack_bias(self, bias: Tensor | None, groups: int) -> Tensor | None:
        return bias


class _BatchedLinearMap:
    """One linear map for each entry of dim 0."""

    def __call__(self, x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.bmm(x, weights.transpose(1, 2))
        return y if bias is None else y + bias

    def backward(self, g: Tensor, x: Tensor, weights: Tensor, needs: tuple[bool, bool, bool]) -> Gradients:
        return (
            torch.bmm(g, weights) if needs[0] else None,
            torch.bmm(g.transpose(1, 2), x) if needs[1] else None,
            g.sum(1) if needs[2] else None,
        )
