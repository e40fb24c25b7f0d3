"""A teacher without classes: an encoder whose output is what the student's features learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks.surgery.outputs import first_tensor
from lorkd_monai.teachers.teacher import Teacher

__all__ = ["FeatureTeacher"]


class FeatureTeacher(Teacher):
    """A frozen encoder: it has logits for no task, and gives its output, pooled over space or tokens, as features.

    Args:
        network: B×C×H×W[×D] images to features B×D, B×D×spatial, or tokens B×N×D.
        num_classes: task -> number of classes, in the student's order.
        tokens: the output is B×N×D: the mean is taken over N.
        options: ``in_channels`` and ``intensity``, as of `Teacher`.
    """

    def __init__(
        self, network: nn.Module, num_classes: Mapping[str, int], tokens: bool = False, **options: Any
    ) -> None:
        super().__init__(network, {}, num_classes, **options)
        self.tokens = tokens
        self.identity = ["features", tokens]

    @torch.no_grad()
    def forward(  # type: ignore[override]  # there are no logits
        self, x: Tensor, task: Tensor | int | Sequence[int], return_features: bool = False, shown: bool = False
    ) -> tuple[None, Tensor]:
        """No logits, and the features: B × D.

        Raises:
            LoRKDError: it is asked for logits, a task out of range, or an output that is no features.
        """
        if not return_features:
            raise LoRKDError("this teacher has features only, no classes: train with the transfer of features")
        return None, self.features_of(x, task, shown)

    @torch.no_grad()
    def features_of(self, x: Tensor, task: Tensor | int | Sequence[int] = 0, shown: bool = False) -> Tensor:
        """The encoder's output, pooled: B × D."""
        y = first_tensor(self.network(self._adapted(x, self._rows(x, task), shown)))
        if y.ndim < 2 or y.shape[0] != x.shape[0] or (self.tokens and y.ndim != 3):
            raise LoRKDError(
                f"the teacher's output has shape {tuple(y.shape)}; expected features of {x.shape[0]} images"
            )
        if y.ndim == 2:
            return y
        return y.mean(1) if self.tokens else y.flatten(2).mean(2)
