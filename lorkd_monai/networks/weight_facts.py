"""What other code may know of a weight that each task has its own of: its type and place, never its values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lorkd_monai.errors import LoRKDError

__all__ = ["READABLE", "WeightFacts", "readable"]

# What other modules may read of a layer or head that was replaced.
READABLE = {
    "in_channels", "out_channels", "in_features", "out_features", "kernel_size", "stride", "padding",
    "dilation", "groups", "padding_mode", "output_padding", "transposed", "weight", "bias",
}  # fmt: skip


class WeightRead(LoRKDError, AttributeError):
    """A routed layer's weight was asked for; ``hasattr`` answers False."""


_FACTS = {
    getattr(Tensor, name).__get__
    for name in ("dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_cuda", "is_meta", "is_leaf",
                 "is_quantized", "is_sparse", "is_mps", "itemsize")
} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size, Tensor.is_floating_point, Tensor.is_complex,
    Tensor.get_device, Tensor.__len__, torch.is_floating_point, torch.is_complex, torch.numel,
    Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor,
    torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like,
}  # fmt: skip
_TARGETS = {Tensor.to, Tensor.type_as}  # of another tensor, which takes over type and place


class WeightFacts(Tensor):
    """A tensor that tells type, device and shape of a weight; whatever would compute with it is refused.

    Networks of others ask a layer for its ``weight.dtype`` to convert an image. Code that computes with a weight by
    itself, past the layer, would leave the experts out.

    Args:
        weight: the weight that all tasks share.
        refusal: what the error says.
    """

    @staticmethod
    def __new__(cls, weight: Tensor, refusal: str) -> WeightFacts:
        """Wrap a weight."""
        facts = Tensor._make_wrapper_subclass(
            cls, weight.shape, dtype=weight.dtype, device=weight.device, requires_grad=weight.requires_grad
        )
        facts.__dict__.update(told=weight.detach().requires_grad_(weight.requires_grad), refusal=refusal)
        return facts

    @classmethod
    def __torch_function__(cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Answer questions for facts, and refuse all else."""
        facts = next(a for a in _flat(args, kwargs) if isinstance(a, WeightFacts))
        of_another = func in _TARGETS and not isinstance(args[0], WeightFacts)
        if func not in _FACTS and not of_another:
            raise WeightRead(facts.__dict__["refusal"])
        told = [a.__dict__["told"] if isinstance(a, WeightFacts) else a for a in args]
        named = {k: v.__dict__["told"] if isinstance(v, WeightFacts) else v for k, v in (kwargs or {}).items()}
        return func(*told, **named)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch annotates it as an attribute
        cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Refuse what gets past ``__torch_function__``."""
        raise WeightRead(next(a for a in _flat(args, kwargs) if isinstance(a, WeightFacts)).__dict__["refusal"])


def _flat(args: Iterable, kwargs: dict | None = None) -> list:
    values = [*args, *(kwargs or {}).values()]
    return values + [w for v in values if isinstance(v, (list, tuple)) for w in _flat(v)]


def readable(module: Any, item: str, refusal: str) -> Any:
    """An attribute of a replaced module, its tensors as :class:`WeightFacts`."""
    value = getattr(module, item)
    return WeightFacts(value, refusal) if isinstance(value, Tensor) else value
