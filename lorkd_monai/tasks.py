"""A task and its kind of work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorkd_monai.errors import LoRKDError

__all__ = ["TaskSpec", "check_kind"]


@dataclass(frozen=True)
class TaskSpec:
    """One task of a data list.

    ``labels`` names the class ids 0..n-1. ``channels`` are those of its images. ``intensity`` is
    ``{"range": [low, high]}`` or ``{"percentiles": [low, high]}``, None for the default of its kind (see
    `lorkd_monai.transforms.default_intensity`). ``spacing`` (mm, axes of RAS) is what 3D segmentation resamples to.
    ``measured`` says that the list states no intensity, so that 2D files of 8 and 16 bits each have their own depth.
    ``vista3d_class`` gives VISTA3D's index of each class id, for that teacher.
    ``score`` is False for a task that is there to try things out: its figures stand apart and count in no mean.
    ``licence`` and ``authors`` of its images are the task's own, else those of the list.
    """

    name: str
    index: int
    labels: dict[int, str]
    modality: str | None = None
    body_part: str | None = None
    note: str | None = None
    channels: int | None = None
    intensity: dict[str, Any] | None = None
    spacing: tuple[float, ...] | None = None
    score: bool = True
    vista3d_class: dict[int, int] | None = None
    licence: str | None = None
    authors: list[str] | None = None
    measured: bool = False

    @property
    def num_classes(self) -> int:
        """Number of classes, background included."""
        return len(self.labels)


def check_kind(kind: str, spatial_dims: int) -> None:
    """Raise a `LoRKDError` unless ``kind`` and ``spatial_dims`` name one of the four kinds of work."""
    if kind not in ("classification", "segmentation") or spatial_dims not in (2, 3):
        raise LoRKDError(
            "expected kind 'classification' or 'segmentation' and spatial_dims 2 or 3, "
            f"got {kind!r} and {spatial_dims!r}."
        )
