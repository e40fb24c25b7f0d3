"""Percentile bootstrap over images: the same resamples for every figure, so that methods can be compared in pairs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["figure", "resampling_weights"]


def resampling_weights(count: int, resamples: int, seed: int = 0) -> Tensor:
    """``resamples`` × ``count``: how often each of ``count`` images occurs in each resample with replacement."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (resamples, count), generator=generator)
    return torch.zeros(resamples, count, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(drawn.shape, dtype=torch.float64)
    )


def figure(statistic: Callable[[Tensor], Tensor], weights: Tensor) -> dict[str, float]:
    """A statistic with the central 95 % of its bootstrap distribution.

    Args:
        statistic: R × N weights -> R values.
        weights: as :func:`resampling_weights` gives them.

    Returns:
        ``{"value", "low", "high", "n"}``.
    """
    count = weights.shape[1]
    result = {"value": statistic(torch.ones(1, count, dtype=torch.float64)).item()}
    if len(weights):
        values = statistic(weights)
        values = values[values.isfinite()]
        if len(values):
            low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
            result |= {"low": low, "high": high}
    return {**result, "n": count}
