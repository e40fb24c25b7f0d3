"""Percentile bootstrap over images or patients: the same resamples for every metric, so that methods can be paired.

`scipy.stats.bootstrap` resamples values, one statistic at a time. Here a resample is a row of weights, which say how
often each image counts: tasks, methods and metrics share it, a patient's images are drawn together, and memory stays
bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CHUNK", "Clusters", "figures", "resampling_weights", "weight_chunks"]

# Numbers of one chunk of weights: 32 MiB, of which a statistic may need some ten times as much.
CHUNK = 2**22


@dataclass(frozen=True)
class Clusters:
    """The patients of one task's images, who are drawn in place of the images.

    Attributes:
        of_image: N numbers, the patient of each image.
        count: number of patients, also those who have images of other tasks alone: tasks that share patients are
            resampled together.
        most_images: images of the task that has most of them, of those that are resampled together.
        group: number of the first of these tasks.
    """

    of_image: Tensor
    count: int
    most_images: int
    group: int = 0


def weight_chunks(count: int, resamples: int, seed: int = 0, clusters: Clusters | None = None) -> Iterator[Tensor]:
    """The rows of :func:`resampling_weights`, so many at a time that memory does not grow with the images.

    With ``clusters`` patients are drawn, and each image counts as often as its patient. Tasks of one group, with one
    seed, have the same patients in each row; a row may then hold no image of a task.
    """
    generator = torch.Generator().manual_seed(seed)
    units = count if clusters is None else clusters.count
    step = max(8, CHUNK // max(1, units, 0 if clusters is None else clusters.most_images))
    for start in range(0, resamples, step):
        drawn = torch.randint(units, (min(step, resamples - start), units), generator=generator)
        once = torch.ones(1, 1, dtype=torch.float64).expand(drawn.shape)
        weights = torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, once)
        yield weights if clusters is None else weights[:, clusters.of_image]


def resampling_weights(count: int, resamples: int, seed: int = 0) -> Tensor:
    """``resamples`` × ``count``: how often each of ``count`` images occurs in each resample with replacement."""
    return torch.cat([torch.empty(0, count, dtype=torch.float64), *weight_chunks(count, resamples, seed)])


def figures(
    statistics: Mapping[str, Callable[[Tensor], Tensor]],
    count: int,
    resamples: int,
    seed: int = 0,
    clusters: Clusters | None = None,
) -> dict[str, dict[str, float]]:
    """Statistics of ``count`` images, each with the central 95 % of its bootstrap distribution.

    Args:
        statistics: R × N weights (how often each image counts) -> R values.
        count: number of images.
        resamples: of the images.
        seed: of the resampling.
        clusters: the patients, who are resampled in place of the images.

    Returns:
        ``{name: {"value", "low", "high", "n"}}``; no interval where no resample gives a finite value.
    """
    once = torch.ones(1, count, dtype=torch.float64)
    found = {name: {"value": statistic(once).item()} for name, statistic in statistics.items()}
    values: dict[str, list[Tensor]] = {name: [] for name in statistics}
    for weights in weight_chunks(count, resamples, seed, clusters):
        for name, statistic in statistics.items():
            values[name].append(statistic(weights))
    for name, parts in values.items():
        finite = torch.cat([part[part.isfinite()] for part in parts]) if parts else torch.empty(0)
        if len(finite):
            low, high = finite.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
            found[name] |= {"low": low, "high": high}
        found[name]["n"] = count
    return found
