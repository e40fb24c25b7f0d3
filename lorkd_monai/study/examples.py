"""Example segmentations: the best, the median and the worst test image of each task."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from monai.inferers import Inferer
from torch import Tensor, nn

from lorkd_monai.data import TaskDataset

__all__ = ["example_arrays"]

_RANKS = ("best", "worst", "median")  # the middle one last: it is left out of two


@torch.no_grad()
def example_arrays(
    network: nn.Module,
    dataset: TaskDataset,
    predictions: Mapping[str, Mapping[str, Tensor]],
    device: torch.device | str,
    inferer: Inferer,
) -> dict[str, np.ndarray]:
    """Image, label and prediction, as uint8 H×W, of three test images of each task, by ``"<task>_<rank>_<what>"``.

    Of one or two test images, each is taken once.

    A volume is shown in the slice along its last axis that holds most of the label.

    Args:
        network: takes (image, task).
        dataset: the test images.
        predictions: with the ``dice`` of each image, in the data set's order.
        device: where the network is.
        inferer: such as sliding windows.
    """
    arrays = {}
    for name, kept in predictions.items():
        number = dataset.data.tasks[name].index
        items = [i for i, task in enumerate(dataset.task_of_item) if task == number]
        dice = kept["dice"].double().nanmean(1)
        known = (~dice.isnan()).nonzero()[:, 0]  # an image without a label, rightly left empty, has no Dice
        order = known[dice[known].argsort(descending=True, stable=True)].tolist()
        shown_before: set[int] = set()
        for rank, place in zip(_RANKS, (0, len(order) - 1, len(order) // 2), strict=True):
            if not order or place in shown_before:  # of one or two images
                continue
            shown_before.add(place)
            item = dataset[items[order[place]]]
            task = torch.tensor([number], device=device)
            logits = inferer(item["image"][None].to(device), network, task)[0]
            guess = logits[: dataset.data.tasks[name].num_classes].argmax(0).cpu()
            shown = {"image": item["image"].mean(0) * 255, "label": item["label"][0], "prediction": guess}
            if guess.ndim == 3:
                middle = int((item["label"][0] > 0).sum((0, 1)).argmax())
                shown = {key: value[..., middle] for key, value in shown.items()}
            for key, value in shown.items():
                arrays[f"{number}_{rank}_{key}"] = value.clamp(0, 255).to(torch.uint8).numpy()
            arrays[f"{number}_{rank}_dice"] = np.float64(dice[order[place]])
    return arrays
