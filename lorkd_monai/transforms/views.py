"""A fixed number of views of each image, the same in every epoch and every run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["augment_together", "fixed_view"]


def augment_together(augment: Callable, channels: int) -> Callable:
    """An augmentation of images that hold, after the student's ``channels``, what a teacher sees of them.

    Both are changed in the same way. ``augment`` is for values in 0..1: the teacher's go there and back by their own
    range, so that its contrast and brightness change as the student's do.

    Args:
        augment: ``augment(image, mask or None, iteration)``, see `BatchAugment`; the same for the same iteration.
        channels: of the student's images.
    """

    def both(image: Tensor, label: Tensor | None, iteration: int) -> tuple[Tensor, Tensor | None]:
        own, mask = augment(image[:, :channels], label, iteration)
        seen = image[:, channels:]
        low, high = (f(seen.flatten(1), 1).view(-1, *[1] * (seen.ndim - 1)) for f in (torch.amin, torch.amax))
        span = (high - low).clamp_min(torch.finfo(seen.dtype).tiny)
        shown, _ = augment((seen - low) / span, None, iteration)
        return torch.cat([own, shown * span + low], 1), mask

    return both


def fixed_view(augment: Callable, image: Tensor, label: Tensor | None, view: int) -> tuple[Tensor, Tensor | None]:
    """One of the fixed views of each sample of a batch.

    View 0 is the sample itself. Any other view depends only on the sample's own values and the view's number, not on
    the batch or the iteration, so that the teacher's answer to it can be looked up later.

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
