"""Losses of the tasks, for outputs that are -inf in the channels past each sample's own head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from monai.losses import DeepSupervisionLoss, DiceCELoss
from torch import Tensor, nn

from lorkd_monai.errors import LoRKDError
from lorkd_monai.losses.transfer import full_precision

__all__ = ["CrossEntropyPerTask", "PerTaskLoss", "UNLABELLED", "dice_ce", "labelled_samples", "levels_of"]

UNLABELLED = -1  # an unknown class label, or each voxel of an unknown label map


def levels_of(output: Tensor | list[Tensor] | tuple[Tensor, ...], spatial_dims: int) -> list[Tensor]:
    """The outputs of a deeply supervised network, full resolution first; one tensor gives a list of one.

    A list or tuple is used as it is (SegResNet-DS, UNet++). A tensor with one dimension more than B×C×spatial is
    a stack B×K×C×spatial (DynUNet in training).
    """
    if isinstance(output, Tensor):
        output = output.unbind(1) if spatial_dims and output.ndim == spatial_dims + 3 else [output]
    return [full_precision(level) for level in output]


def labelled_samples(label: Tensor) -> Tensor:
    """B booleans: False for a sample whose label, or whole label map, is -1."""
    return ~(label == UNLABELLED).flatten(1).all(1) if label.ndim > 1 else label != UNLABELLED


def check_labels(label: Tensor, labelled: Tensor, channels: Tensor, task: Tensor, names: Sequence[str]) -> None:
    """Raise `LoRKDError` for a label of a labelled sample outside 0..n-1, with n the sample's ``channels``."""
    flat = label.reshape(len(label), -1)
    low, high = flat.min(1).values, flat.max(1).values
    bad = labelled & ((low < 0) | (high >= channels))
    if bad.any():
        b = int(bad.nonzero()[0])
        n = int(channels[b])
        raise LoRKDError(
            f"label outside the classes: task {names[int(task[b])]!r} has classes 0 to {n - 1}, sample {b} of the "
            f"batch has labels from {low[b].item():g} to {high[b].item():g}. Correct its label in the data list "
            f"({UNLABELLED} marks a sample without one)."
        )


class CrossEntropyPerTask(nn.Module):
    """Cross entropy of each sample over its own channels, for classification.

    For a sample of class y and a task of n channels, with label smoothing ε and class weights w (1 by default):
    ``- sum over own c of  w_c · ((1-ε)·[c = y] + ε/n) · log softmax(z)_c``, which is
    `torch.nn.functional.cross_entropy` with ``reduction="none"`` on the first n channels. Weights are not normalised:
    give them a mean of about 1 over the samples (n_samples / (n · n_samples_of_c) does).

    Args:
        class_weights: {task name: one weight for each class}; other tasks have none.
        label_smoothing: one number in [0, 1), or {task name: number}.
    """

    def __init__(
        self,
        class_weights: Mapping[str, Sequence[float]] | None = None,
        label_smoothing: float | Mapping[str, float] = 0.0,
    ) -> None:
        super().__init__()
        self.class_weights = {name: [float(w) for w in ws] for name, ws in (class_weights or {}).items()}
        self.label_smoothing = label_smoothing
        values = label_smoothing.values() if isinstance(label_smoothing, Mapping) else [label_smoothing]
        if not all(0.0 <= float(v) < 1.0 for v in values):
            raise LoRKDError(f"label_smoothing: expected numbers in [0, 1), got {label_smoothing!r}")
        for name, weights in self.class_weights.items():
            if not all(0.0 <= w < float("inf") for w in weights):
                raise LoRKDError(f"class_weights: task {name!r} has {weights}; expected finite numbers of 0 or more")

    def check_tasks(self, num_classes: Mapping[str, int]) -> None:
        """Raise `LoRKDError` if an option names an unknown task or has the wrong number of classes."""
        smoothed = self.label_smoothing if isinstance(self.label_smoothing, Mapping) else {}
        for option, names in (("class_weights", self.class_weights), ("label_smoothing", smoothed)):
            for name in names:
                if name not in num_classes:
                    raise LoRKDError(f"{option}: unknown task {name!r}; the tasks are {sorted(num_classes)}")
        for name, weights in self.class_weights.items():
            if len(weights) != num_classes[name]:
                raise LoRKDError(
                    f"class_weights: task {name!r} has {num_classes[name]} classes, got {len(weights)} weights"
                )

    def forward(self, logits: Tensor, label: Tensor, task: Tensor, own: Tensor, names: Sequence[str]) -> Tensor:
        """Return B losses. ``own`` is the B×C mask of the samples' own channels; labels of -1 count as 0."""
        smoothing: Any = self.label_smoothing
        if isinstance(smoothing, Mapping):
            table = logits.new_tensor([float(smoothing.get(name, 0.0)) for name in names])
            smoothing = table[task].unsqueeze(1)
        log_q = logits.masked_fill(~own, float("-inf")).log_softmax(1).masked_fill(~own, 0.0)
        target = F.one_hot(label.clamp(min=0), logits.shape[1]).to(logits.dtype)
        target = (1 - smoothing) * target + smoothing * own / own.sum(1, keepdim=True)
        if self.class_weights:
            table = logits.new_ones(len(names), logits.shape[1])
            for row, name in enumerate(names):
                weights = self.class_weights.get(name, ())
                table[row, : len(weights)] = table.new_tensor(weights)
            target = target * table[task]
        return -(target * log_q).sum(1)


class PerTaskLoss(nn.Module):
    """Apply a loss to the samples of each task separately, on the task's own channels.

    Args:
        loss: called as ``loss(output of one task B_t×n_t×…, its label) -> scalar``, the mean over these samples.
        deep_supervision: the weights over resolutions of MONAI's `DeepSupervisionLoss` ("exp", "same", "two"), or
            a list of weights. Labels are resized to each resolution by nearest neighbour.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], deep_supervision: str | Sequence[float] = "exp"):
        super().__init__()
        if isinstance(deep_supervision, str) and deep_supervision not in ("exp", "same", "two"):
            raise LoRKDError(
                f"deep_supervision: expected 'exp', 'same', 'two' or a list of weights, got {deep_supervision!r}"
            )
        self.loss = loss
        self._fixed = None if isinstance(deep_supervision, str) else [float(w) for w in deep_supervision]
        self._mode = deep_supervision if isinstance(deep_supervision, str) else "exp"

    def forward(self, levels: Sequence[Tensor], label: Tensor, channels: int) -> Tensor:
        """Return the loss of samples that are all of one task with ``channels`` channels."""
        if self._fixed is not None and len(self._fixed) < len(levels):
            raise LoRKDError(f"deep_supervision: the network has {len(levels)} outputs, got {len(self._fixed)} weights")
        weights = DeepSupervisionLoss(self.loss, self._mode, self._fixed).get_weights(len(levels))
        total = levels[0].new_zeros(())
        for weight, output in zip(weights, levels):
            target = label
            if output.ndim > 2 and output.shape[2:] != label.shape[2:]:
                target = F.interpolate(label.to(output.dtype), size=output.shape[2:], mode="nearest-exact")
            total = total + weight * self.loss(output[:, :channels], target)
        return total


class _DiceCEAnyChannels(nn.Module):
    """MONAI's `DiceCELoss`: softmax over two channels or more, sigmoid where a task has one."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        # A task of one channel has no background to leave out.
        self.many = DiceCELoss(to_onehot_y=True, softmax=True, **options)
        self.single = DiceCELoss(sigmoid=True, **{**options, "include_background": True})

    def forward(self, output: Tensor, label: Tensor) -> Tensor:
        if output.shape[1] == 1:
            return self.single(output, label.to(output.dtype))
        return self.many(output, label)


def dice_ce(**options: object) -> nn.Module:
    """MONAI's `DiceCELoss` for integer label maps B×1×spatial; ``options`` go to it (``include_background`` …)."""
    try:
        return _DiceCEAnyChannels(**options)
    except TypeError as error:
        raise LoRKDError(f"dice_ce: an option that MONAI's DiceCELoss does not take: {error}") from error
