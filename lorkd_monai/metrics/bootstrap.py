"""Percentile bootstrap over images or patients: the same resamples for every metric, so that methods can be paired.

`scipy.stats.bootstrap` resamples values, one statistic at a time. Here a resample is a row of weights: how often each
image counts. Tasks, methods and metrics share it, the images of a patient are drawn together, and memory is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CHUNK", "Clusters", "figures", "resampling_weights", "weight_chunks"]

# Numbers in one chunk of weights: 32 MiB. A statistic may need about ten times as much.
CHUNK = 2**22


@dataclass(frozen=True)
class Clusters:
    """The patients of one task's images; patients are drawn instead of images.

    Tasks that share patients are resampled together, as a group.

    Attributes:
        of_image: N numbers, the patient of each image.
        count: number of patients of the group.
        most_images: the largest number of images of a task of the group.
        group: number of the group's first task.
    """

    of_image: Tensor
    count: int
    most_images: int
    group: int = 0


def weight_chunks(count: int, resamples: int, seed: int = 0, clusters: Clusters | None = None) -> Iterator[Tensor]:
    """The rows of :func:`resampling_weights`, in chunks whose size does not grow with the number of images.

    With ``clusters`` patients are drawn, and each image counts as often as its patient. Tasks of one group have, with
    the same seed, the same patients in each row; a row may hold no image of a task.
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
    """Statistics over ``count`` images, each with its 95 % bootstrap interval (central percentiles).

    Args:
        statistics: R × N weights (how often each image counts) -> R values.
        count: number of images.
        resamples: their number.
        seed: of the resampling.
        clusters: the patients, if they are resampled instead of the images.

    Returns:
        ``{name: {"value", "low", "high", "n"}}``; no interval if no resample gives a finite value.
    """
    once = torch.ones(1, count, dtype=torch.float64)
    values: dict[str, list[Tensor]] = {name: [once.new_empty(0)] for name in statistics}
    for weights in weight_chunks(count, resamples, seed, clusters):
        for name, statistic in statistics.items():
            values[name].append(statistic(weights))
    found = {}
    for name, statistic in statistics.items():
        found[name] = {"value": statistic(once).item()}
        resampled = torch.cat(values[name])
        finite = resampled[resampled.isfinite()]
        if len(finite):
            low, high = finite.quantile(once.new_tensor([0.025, 0.975])).tolist()
            found[name] |= {"low": low, "high": high}
        found[name]["n"] = count
    return found
