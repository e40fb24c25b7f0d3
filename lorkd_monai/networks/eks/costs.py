"""Which strategy serves one layer in one call.

A model of the costs decides, from shapes and routing alone: two runs with one seed take the same strategies, round
alike and end with the same weights.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import NamedTuple

from lorkd_monai.errors import LoRKDError

__all__ = ["STRATEGIES", "Situation", "choose", "eks_strategy"]

STRATEGIES = ("split", "group", "factored")
_CHOICES = (*STRATEGIES, "auto")


class _Prices(NamedTuple):
    """Time of forward and backward in ns. How they were measured: docs/performance.md."""

    call: float  # one segment of a split batch: its kernel calls
    weight: float  # one number of a merged weight: merging twice, reordering for the kernel, its gradient
    moved: float  # one number of the input or output: cutting the batch and joining it
    grouped_call: float
    grouped_weight: float  # one number of the weights in a grouped call, up to _CACHED of them
    grouped_weight_beyond: float
    grouped_moved: float  # one number of the input or output, laid side by side for a grouped call
    grouped_in_place: float  # one that lies so already, see Situation.in_place
    thin_operation: float  # what an operation costs more in a grouped call, where a group has fewer than 8 channels
    branch_call: float
    branch: float  # one operation of the low-rank branch
    branch_moved: float
    unfold: float  # one number of an input that is unfolded into the windows of the kernel
    slow: float  # what an operation costs more in torch's own 3D kernel, see left_to_slow_kernel
    slow_strided: float


_CACHED = 2 * 10**6  # numbers; about what the caches of a core hold
_CPU = _Prices(560e3, 6.6, 2.1, 850e3, 8.0, 17.0, 3.8, 0.4, 0.14, 1500e3, 0.05, 5.5, 13.0, 0.2, 0.07)
# Estimated, not measured: kernels are started in about 10 us each, and memory is a hundred times faster.
_GPU = _Prices(150e3, 0.1, 0.02, 100e3, 0.15, 0.15, 0.03, 0.0, 2e-4, 150e3, 2e-4, 0.03, 0.1, 0.0, 0.0)


class Situation(NamedTuple):
    """What the choice depends on."""

    device: str
    sizes: tuple[int, ...]  # rows of each segment
    positions: int  # of a row's output (of its input, for a transposed convolution)
    weight: int  # numbers in W0
    moved: int  # numbers of input and output together
    branch: int  # numbers in the filters of the low-rank branch; 0 where ΔW can't be written as two maps
    channels: int  # the fewer of a group's input and output channels
    unfolded: int = 0  # numbers of the unfolded input; 0 where it can't be unfolded
    slow: str = ""  # "plain" or "strided" where segments of one sample are left to a slow kernel
    rounds: int = 1  # of the batch, see Routing

    @property
    def groups(self) -> int:
        """Groups of equal size into which the batch can be cut, each within one segment."""
        return sum(self.sizes) // math.gcd(*self.sizes)

    @property
    def in_place(self) -> bool:
        """Whether the batch has the layout of the grouped call already: each group has one row in each round."""
        return math.gcd(*self.sizes) == self.rounds


def _split(s: Situation, price: _Prices, numbers: int) -> float:
    single = sum(size == 1 for size in s.sizes)
    slow = {"": 0.0, "plain": price.slow, "strided": price.slow_strided}[s.slow] * single * s.positions
    return len(s.sizes) * (price.call + price.weight * numbers) + slow * numbers


def _group(s: Situation, price: _Prices, numbers: int) -> float:
    thin = price.thin_operation * sum(s.sizes) * s.positions if s.channels < 8 else 0.0
    weights = s.groups * numbers
    beyond = max(0, weights - _CACHED)
    weight = price.grouped_weight * (weights - beyond) + price.grouped_weight_beyond * beyond
    return price.grouped_call + weight + thin * numbers


def _branch(s: Situation, price: _Prices) -> dict[str, float]:
    operations = price.branch * s.branch * s.positions * sum(s.sizes)
    found = {"split": operations + _split(s, price, s.branch), "group": operations + _group(s, price, s.branch)}
    if s.unfolded:
        found["unfold"] = price.unfold * s.unfolded
    return found


def _prices(s: Situation) -> _Prices:
    return _CPU if s.device == "cpu" else _GPU


@lru_cache(maxsize=4096)
def costs(s: Situation) -> dict[str, float]:
    """Time that each strategy adds to a plain layer, in ns; for ``"factored"`` with the best form of its branch."""
    price = _prices(s)
    found = {
        "split": _split(s, price, s.weight) + price.moved * s.moved,
        "group": _group(s, price, s.weight) + (price.grouped_in_place if s.in_place else price.grouped_moved) * s.moved,
    }
    if s.branch:
        found["factored"] = price.branch_call + price.branch_moved * s.moved + min(_branch(s, price).values())
    return found


@lru_cache(maxsize=4096)
def branch_form(s: Situation) -> str:
    """How ``"factored"`` computes the first half of ΔW: ``"split"``, ``"group"`` or ``"unfold"``."""
    found = _branch(s, _prices(s))
    return min(found, key=found.__getitem__)


def choose(s: Situation) -> str:
    """The cheapest strategy by the model of the costs."""
    found = costs(s)
    return min(found, key=found.__getitem__)


def left_to_slow_kernel(device: str, shape: tuple[int, ...], kernel: tuple[int, ...], groups: int) -> bool:
    """True where 3D segments of one sample would fall out of oneDNN, as the batch does not."""
    if device != "cpu" or len(kernel) < 3 or shape[0] == 1 or groups > 1:
        return False
    return falls_to_slow_kernel(shape, kernel)


def falls_to_slow_kernel(shape: tuple[int, ...], kernel: tuple[int, ...]) -> bool:
    """True where the CPU convolves one 3D sample (any × C × D × H × W) with a slow kernel.

    torch (2.13, ``ConvParams::use_mkldnn``) takes it for a convolution with batch 1 and one group where C·D·H is at
    most 20480 and the kernel is not larger than 3 in its last two dimensions.
    """
    return shape[1] * shape[2] * shape[3] <= 20480 and not (kernel[-1] > 3 and kernel[-2] > 3)


_FORCED: ContextVar[str | None] = ContextVar("lorkd_eks_strategy", default=None)


@contextmanager
def eks_strategy(name: str) -> Iterator[None]:
    """Force one strategy inside the block, for tests and benchmarks; the environment variable LORKD_EKS does it too.

    Args:
        name: ``"split"``, ``"group"``, ``"factored"`` (``"split"`` where a layer can't be factored), or ``"auto"`` (the
            default: a model of the costs).

    Raises:
        LoRKDError: no such strategy.
    """
    token = _FORCED.set(_checked(name))
    try:
        yield
    finally:
        _FORCED.reset(token)


def _checked(name: str) -> str:
    if name not in _CHOICES:
        raise LoRKDError(f"the EKS strategy must be one of {', '.join(_CHOICES)}, got {name!r}")
    return name


def wanted() -> str:
    """The strategy in force."""
    return _FORCED.get() or _checked(os.environ.get("LORKD_EKS") or "auto")
