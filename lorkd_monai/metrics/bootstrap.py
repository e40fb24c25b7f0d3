"""Percentile bootstrap over images: the same resamples for every figure, so that methods can be compared in pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

__all__ = ["CHUNK", "figures", "resampling_weights", "weight_chunks"]

# Numbers of one chunk of weights: 32 MiB, of which a statistic may need some ten times as much.
CHUNK = 2**22


def weight_chunks(count: int, resamples: int, seed: int = 0) -> Iterator[Tensor]:
    """The rows of :func:`resampling_weights`, so many at a time that memory does not grow with the images."""
    generator = torch.Generator().manual_seed(seed)
    step = max(8, CHUNK // max(1, count))
    for start in range(0, resamples, step):
        drawn = torch.randint(count, (min(step, resamples - start), count), generator=generator)
        once = torch.ones(1, 1, dtype=torch.float64).expand(drawn.shape)
        yield torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, once)


def resampling_weights(count: int, resamples: int, seed: int = 0) -> Tensor:
    """``resamples`` × ``count``: how often each of ``count`` images occurs in each resample with replacement."""
    return torch.cat([torch.empty(0, count, dtype=torch.float64), *weight_chunks(count, resamples, seed)])


def figures(
    statistics: Mapping[str, Callable[[Tensor], Tensor]], count: int, resamples: int, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Statistics of ``count`` images, each with the central 95 % of its bootstrap distribution.

    Args:
        statistics: R × N weights (how often each image counts) -> R values.
        count: number of images.
        resamples: of the images.
        seed: of the resampling.

    Returns:
        ``{name: {"value", "low", "high", "n"}}``; no interval where no resample gives a finite value.
    """
    once = torch.ones(1, count, dtype=torch.float64)
    found = {name: {"value": statistic(once).item()} for name, statistic in statistics.items()}
    values: dict[str, list[Tensor]] = {name: [] for name in statistics}
    for weights in weight_chunks(count, resamples, seed):
        for name, statistic in statistics.items():
            values[name].append(statistic(weights))
    for name, parts in values.items():
        finite = torch.cat([part[part.isfinite()] for part in parts]) if parts else torch.empty(0)
        if len(finite):
            low, high = finite.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
            found[name] |= {"low": low, "high": high}
        found[name]["n"] = count
    return found
