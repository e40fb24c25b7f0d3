"""A task, and the work that networks do: its kind, the images they take, the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorkd_monai.checks import check_whole, is_whole
from lorkd_monai.errors import LoRKDError

__all__ = ["TaskSpec", "Work", "check_kind", "image_sides", "score_of"]


@dataclass(frozen=True)
class TaskSpec:
    """One task of a data list.

    ``labels`` names the class ids 0..n-1. ``channels`` are those of its images. ``intensity`` is
    ``{"range": [low, high]}`` or ``{"percentiles": [low, high]}``, None for the default of its kind (see
    `lorkd_monai.transforms.default_intensity`). ``spacing`` (mm, axes of RAS) is what 3D segmentation resamples to.
    ``measured`` says that the list states no intensity, so that 2D files of 8 and 16 bits each have their own depth.
    ``vista3d_class`` gives VISTA3D's index of each class id, for that teacher.
    ``score`` is False for a task that is there to try things out: its metrics are listed apart and count in no mean.
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


@dataclass(frozen=True)
class Work:
    """What a network is for: the kind of work, the images that it takes, and its tasks.

    Args:
        kind: ``"classification"`` or ``"segmentation"``.
        spatial_dims: 2 or 3.
        in_channels: channels of the network's input.
        image_size: size of its images, or of its patches and windows, in voxels: one number for all sides, or one each.
        tasks: by name, in the order of their classes.

    Raises:
        LoRKDError: a value does not fit.

    Example::

        >>> breast = TaskSpec("breast", 0, {0: "benign", 1: "malignant"})
        >>> Work("classification", 2, 3, 32, {"breast": breast}).image_size
        (32, 32)
    """

    kind: str
    spatial_dims: int
    in_channels: int
    image_size: tuple[int, ...]
    tasks: dict[str, TaskSpec]

    def __post_init__(self) -> None:
        check_kind(self.kind, self.spatial_dims)
        check_whole("in_channels", self.in_channels)
        object.__setattr__(self, "image_size", image_sides(self.image_size, self.spatial_dims))  # an int, as in configs

    def only(self, *names: str) -> Work:
        """The same work for some of the tasks."""
        return replace(self, tasks={name: self.tasks[name] for name in names})

    @property
    def task(self) -> TaskSpec:
        """The task of an expert.

        Raises:
            LoRKDError: there are several, or none.
        """
        if len(self.tasks) != 1:
            raise LoRKDError(f"expected the work of one task, got {len(self.tasks)}: {', '.join(self.tasks)}")
        return next(iter(self.tasks.values()))

    @property
    def image_shape(self) -> tuple[int, ...]:
        """One input: 1 × C × H × W [× D]."""
        return (1, self.in_channels, *self.image_size)


def check_kind(kind: str, spatial_dims: int) -> None:
    """Raise a `LoRKDError` unless ``kind`` and ``spatial_dims`` name one of the four kinds of work."""
    if kind not in ("classification", "segmentation") or spatial_dims not in (2, 3):
        raise LoRKDError(
            "expected kind 'classification' or 'segmentation' and spatial_dims 2 or 3, "
            f"got {kind!r} and {spatial_dims!r}."
        )


def score_of(kind: str) -> str:
    """The metric that networks of this kind of work are compared by."""
    return "balanced_accuracy" if kind == "classification" else "dice"


def image_sides(image_size: int | Sequence[int], spatial_dims: int) -> tuple[int, ...]:
    """The sides of an image, in voxels, of one number for all or of one for each axis.

    Raises:
        LoRKDError: other than ``spatial_dims`` sides, or a side that is no whole number above 0.

    Example::

        >>> image_sides(64, 2), image_sides([96, 96, 64], 3)
        ((64, 64), (96, 96, 64))
    """
    sides = (image_size,) * spatial_dims if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != spatial_dims or not all(map(is_whole, sides)):
        raise LoRKDError(f"image_size must be a whole number above 0, or {spatial_dims} of them, got {image_size!r}.")
    return sides
