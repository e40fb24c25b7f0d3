"""Segmentation: Dice, normalised surface Dice and 95 % Hausdorff distance of one task, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from monai.networks.utils import one_hot
from torch import Tensor

from lorkd_monai.errors import LoRKDError
from lorkd_monai.metrics.bootstrap import Clusters, figures

__all__ = ["case_scores", "segmentation_figures"]


def case_scores(
    predicted: Tensor,
    label: Tensor,
    num_classes: int,
    spacing: Sequence[float] | None = None,
    tolerance: float = 1.0,
    surface: bool = True,
) -> dict[str, Tensor]:
    """Scores of one case, one for each foreground class; NaN if the class is in neither mask.

    Args:
        predicted: class numbers, H × W [× D].
        label: class numbers of the same shape.
        num_classes: number of classes, background (0) included.
        spacing: size of a voxel in mm; None: distances are in voxels.
        tolerance: of the surface Dice, in the unit of ``spacing``.
        surface: compute the surface scores too, which take longer.

    Returns:
        ``dice``, and with ``surface`` ``nsd`` (normalised surface Dice) and ``hd95`` (95 % Hausdorff distance; infinite
        if one of the two masks is empty).

    Raises:
        LoRKDError: the shapes differ.
    """
    if predicted.shape != label.shape:
        raise LoRKDError(f"prediction {tuple(predicted.shape)} and label {tuple(label.shape)} differ in shape")
    pred, true = (one_hot(m[None, None].long(), num_classes) for m in (predicted, label))
    in_either = (pred + true)[0, 1:].flatten(1).any(1)
    dice = compute_dice(pred, true, include_background=False, ignore_empty=False)[0]
    scores = {"dice": dice.masked_fill(~in_either, float("nan"))}
    if not surface:
        return scores
    in_both = pred[0, 1:].flatten(1).any(1) & true[0, 1:].flatten(1).any(1)
    nsd = in_either.double().mul(0)
    hd95 = torch.full_like(nsd, float("inf"))
    spacing = None if spacing is None else [float(s) for s in spacing]
    for c in in_both.nonzero().flatten().tolist():
        one, other = pred[:, c + 1 : c + 2], true[:, c + 1 : c + 2]
        nsd[c] = compute_surface_dice(one, other, [tolerance], include_background=True, spacing=spacing).item()
        hd95[c] = compute_hausdorff_distance(one, other, include_background=True, percentile=95, spacing=spacing).item()
    nsd[~in_either] = hd95[~in_either] = float("nan")
    return scores | {"nsd": nsd, "hd95": hd95}


def segmentation_figures(
    scores: Mapping[str, Tensor],
    classes: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
    clusters: Clusters | None = None,
) -> dict[str, dict[str, float]]:
    """Metrics of one task over N cases.

    Args:
        scores: name -> N × C values, C being the foreground classes, as :func:`case_scores` gives them for each case.
        classes: names of the foreground classes.
        resamples: bootstrap resamples of the cases for the intervals.
        seed: of the resampling.
        clusters: the patients, if they are resampled instead of the cases.

    Returns:
        ``{name: {"value", "low", "high", "n"}}`` for each score: the mean over cases of the mean over classes, and with
        several classes, ``"<score> <class>"`` for each. Means leave out missing values and infinite distances (the
        Dice of such a case is 0); ``n`` is the number of cases in the mean. A score without any value is left out.
    """
    found: dict[str, dict[str, float]] = {}
    for name, values in scores.items():
        values = values.double()
        values = values.masked_fill(~values.isfinite(), float("nan"))
        columns = {name: values.nanmean(1)}
        if len(classes) > 1:
            columns |= {f"{name} {text}": values[:, c] for c, text in enumerate(classes)}
        columns = {key: column for key, column in columns.items() if not column.isnan().all()}
        means = {key: lambda w, c=column: _weighted_mean(w, c) for key, column in columns.items()}
        found |= figures(means, len(values), resamples, seed, clusters)
        for key, column in columns.items():
            found[key]["n"] = int((~column.isnan()).sum())
    return found


def _weighted_mean(weights: Tensor, values: Tensor) -> Tensor:
    known = ~values.isnan()
    kept = weights[:, known]
    return kept @ values[known] / kept.sum(1)
