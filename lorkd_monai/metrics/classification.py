"""Classification: accuracy, balanced accuracy and AUROC of one task, with bootstrap intervals."""

from __future__ import annotations

import torch
from torch import Tensor

from lorkd_monai.errors import LoRKDError
from lorkd_monai.metrics.bootstrap import Clusters, figures

__all__ = ["area_under_roc", "balanced_accuracy", "classification_figures"]


def balanced_accuracy(predicted: Tensor, label: Tensor, num_classes: int, weights: Tensor | None = None) -> Tensor:
    """Mean recall over the classes that occur.

    Args:
        predicted: N class numbers.
        label: N class numbers.
        num_classes: number of classes.
        weights: R × N: how often each sample counts; None: once.

    Returns:
        R values in 0..1, one for each row of ``weights``; NaN for a row of zeros.
    """
    weights = torch.ones(1, len(label), dtype=torch.float64) if weights is None else weights
    classes = torch.nn.functional.one_hot(label.long(), num_classes).to(weights)
    total = weights @ classes
    right = weights @ (classes * (predicted == label).to(weights)[:, None])
    present = total > 0
    return (right / total.clamp_min(1)).mul(present).sum(1) / present.sum(1)


def area_under_roc(score: Tensor, positive: Tensor, weights: Tensor | None = None) -> Tensor:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    Args:
        score: N scores.
        positive: N booleans.
        weights: R × N: how often each sample counts; None: once.

    Returns:
        R values in 0..1; NaN without positives or without negatives.
    """
    weights = torch.ones(1, len(score), dtype=torch.float64) if weights is None else weights
    levels, group = torch.unique(score, return_inverse=True)

    def by_level(chosen: Tensor) -> Tensor:
        return weights.new_zeros(len(weights), len(levels)).index_add_(1, group, weights * chosen.to(weights))

    positives, negatives = by_level(positive), by_level(~positive)
    below = negatives.cumsum(1) - negatives / 2
    return (positives * below).sum(1) / (positives.sum(1) * negatives.sum(1))


def classification_figures(
    probability: Tensor, label: Tensor, resamples: int = 1000, seed: int = 0, clusters: Clusters | None = None
) -> dict[str, dict[str, float]]:
    """Metrics of one task on N images: balanced accuracy, accuracy, AUROC (mean over classes of one against the rest).

    Args:
        probability: N × C.
        label: N class numbers.
        resamples: bootstrap resamples of the images for the intervals.
        seed: of the resampling.
        clusters: the patients, if they are resampled instead of the images.

    Returns:
        ``{name: {"value", "low", "high", "n"}}``; the interval is the central 95 % of the resamples. AUROC is left
        out if not all classes occur. ``majority_rate`` is the share of the largest class.

    Raises:
        LoRKDError: shapes that do not fit, or no images.
    """
    if probability.ndim != 2 or label.shape != probability.shape[:1] or not len(label):
        raise LoRKDError(
            f"expected N × C probabilities and N labels with N > 0, got {tuple(probability.shape)} "
            f"and {tuple(label.shape)}"
        )
    probability, label = probability.double().cpu(), label.long().cpu()
    count, classes = probability.shape
    predicted = probability.argmax(1)
    statistics = {
        "balanced_accuracy": lambda w: balanced_accuracy(predicted, label, classes, w),
        "accuracy": lambda w: w @ (predicted == label).double() / w.sum(1),
    }
    if len(label.unique()) == classes > 1:
        chosen = range(1, 2) if classes == 2 else range(classes)
        statistics["auroc"] = lambda w: torch.stack(
            [area_under_roc(probability[:, c], label == c, w) for c in chosen]
        ).nanmean(0)
    found = figures(statistics, count, resamples, seed, clusters)
    largest = label.bincount(minlength=classes).max().item()
    return {**found, "majority_rate": {"value": largest / count, "n": count}}
