"""Showing each image in a fixed number of ways, the same again in every epoch and every run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["fixed_view"]


def fixed_view(augment: Callable, image: Tensor, label: Tensor | None, view: int) -> tuple[Tensor, Tensor | None]:
    """One of the fixed views of each sample of a batch.

    View 0 is the sample itself. What any other one is depends on the sample's own values and the view's number alone,
    not on the batch or the moment, so that what was learnt about it can be looked up later.

    Args:
        augment: ``augment(image, mask or None, iteration)``, see `BatchAugment`.
        image: B×C×H×W[×D].
        label: masks B×1×H×W[×D], changed along with the images, or None.
        view: 0 or more.
    """
    if view == 0:
        return image, label
    images, labels = [], []
    for i in range(len(image)):
        one = image[i : i + 1]
        digest = hashlib.sha256(one.detach().cpu().contiguous().numpy().tobytes()).digest()
        number = (int.from_bytes(digest[:6], "big") << 8) + view
        changed, mask = augment(one, None if label is None else label[i : i + 1], number)
        images.append(changed)
        labels.append(mask)
    return torch.cat(images), None if label is None else torch.cat(labels)
