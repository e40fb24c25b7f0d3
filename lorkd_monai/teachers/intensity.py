"""Showing a teacher the student's images as its own preprocessing would: in its axes and in its intensities.

Student and teacher see one augmented sample. The student's images are the data's values v, brought to 0..1 by the
task's range: x = (v - low) / (high - low), cut off outside. A teacher from elsewhere wants other numbers. So v is made
of x again, and goes through the transforms of the teacher's bundle; see `teachers/steps.py` for which these are.

The teacher then doesn't see what the student's range cuts off, and a transform that uses statistics of an image (its
mean, its largest value) gets those of the student's patch. In training on volumes, each volume's values come from its
file, whole and not cut off (`TaskDataset.show_to`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from monai.transforms import NormalizeIntensity, ScaleIntensityRange
from torch import Tensor

from lorkd_monai.errors import LoRKDError

__all__ = ["Axes", "StudentImages", "TeacherView", "given_steps"]

Range = tuple[float, float]
_ROUNDING = 4e-7  # of the largest value: what float32 loses on the way to 0..1 and back


@dataclass(frozen=True)
class Axes:
    """The spatial axes of the teacher's images: ``order`` of the student's, those in ``flipped`` reversed after that.

    Example::

        Axes((1, 0), ())             # columns × rows, of the student's rows × columns
        Axes((0, 2, 1), (0, 1))      # LIA, of the student's RAS
    """

    order: tuple[int, ...]
    flipped: tuple[int, ...] = ()

    def turned(self, x: Tensor) -> Tensor:
        """The student's images B×C×… in the teacher's axes."""
        return x.permute(0, 1, *(a + 2 for a in self.order)).flip([a + 2 for a in self.flipped])

    def back(self, y: Tensor) -> Tensor:
        """The teacher's answer B×K×… in the student's axes."""
        return y.flip([a + 2 for a in self.flipped]).permute(
            0, 1, *(self.order.index(a) + 2 for a in range(len(self.order)))
        )


@dataclass(frozen=True)
class StudentImages:
    """What is known of the student's images, for a teacher that is to see them.

    Args:
        ranges: task -> the data's values that the student sees as 0 and 1, None where images are scaled one by one;
            None: a teacher takes the images as they are.
        tasks: those that have such images: the others are not looked up among the teacher's classes. None: all.
        stored: the images (files or arrays), for teachers that take them as they are stored.
        channels: of the images; they are checked against the teacher's where they are given.
        from_files: volumes will come with the values of their files, see `TaskDataset.show_to`.
    """

    ranges: Mapping[str, Range | None] | None = None
    tasks: Sequence[str] | None = None
    stored: Sequence[object] | None = None
    channels: int | None = None
    from_files: bool = False

    def seen(self, tasks: Mapping[str, object]) -> list[str]:
        """The names of ``tasks`` that have images."""
        return [name for name in tasks if self.tasks is None or name in self.tasks]


@dataclass(frozen=True)
class TeacherView:
    """What is done to the student's images on their way to the teacher, and to the answer on its way back.

    Args:
        steps: transforms of one image C×… of the data's values, one after the other.
        ranges: of each task, in the order of the tasks, the data's values that the student sees as 0 and 1.
        axes: of the teacher's images; None: the student's.
        from_files: it wants volumes that come with the values of their files, see `TaskDataset.show_to`.
        words: identifies it, by a word or a hash: answers are kept under it.
        told: describes it, for a log.
    """

    steps: Sequence[Callable[[Tensor], Tensor]] = ()
    ranges: Sequence[Range] = ()
    axes: Axes | None = None
    from_files: bool = False
    words: str = ""
    told: str = ""

    def __call__(self, x: Tensor, tasks: Sequence[int], shown: bool = False) -> Tensor:
        """The teacher's images: B×C×…, the task of each row in ``tasks``. ``shown``: they have its values already."""
        if self.axes is not None:
            x = self.axes.turned(x)
        if shown or not self.steps:
            return x
        images = (values_of(image, self.ranges[t]) for image, t in zip(x, tasks, strict=True))
        return torch.stack([run(self.steps, image).to(x) for image in images])

    def of_values(self, image: Tensor) -> Tensor:
        """One image C×… of the data's values as the teacher sees it, in the student's axes."""
        return run(self.steps, image.clone()).to(image)

    def answer(self, y: Tensor, x: Tensor) -> Tensor:
        """The teacher's output for ``x`` in the student's axes; scores without spatial axes stay as they are."""
        return y if self.axes is None or y.ndim != x.ndim else self.axes.back(y)

    def __str__(self) -> str:
        return f"{self.words} {list(self.ranges)} {self.axes}"


def values_of(image: Tensor, own: Range) -> Tensor:
    """The data's values of an image in 0..1. Whole numbers come back as whole numbers: 0 is 0 again."""
    low, high = own
    values = image * (high - low) + low
    whole = values.round()
    return torch.where((values - whole).abs() <= _ROUNDING * max(abs(low), abs(high), high - low), whole, values)


def run(steps: Sequence[Callable[[Tensor], Tensor]], image: Tensor) -> Tensor:
    """One image C×… after all steps, a plain tensor. It may be changed in place."""
    for step in steps:
        image = step(image)
    return image.as_tensor() if hasattr(image, "as_tensor") else image


def given_steps(intensity: str | Mapping) -> list[Callable[[Tensor], Tensor]]:
    """What a user says: ``"same"``, ``"zscore"``, or ``{"range": [a_min, a_max], "to": [b_min, b_max]}``.

    Raises:
        LoRKDError: something else.
    """
    if intensity == "same":
        return []
    if intensity == "zscore":
        return [NormalizeIntensity()]
    if isinstance(intensity, Mapping) and set(intensity) <= {"range", "to"} and "range" in intensity:
        pairs = [intensity["range"], intensity.get("to", [0.0, 1.0])]
        if all(
            isinstance(p, (list, tuple)) and len(p) == 2 and all(isinstance(v, (int, float)) for v in p) for p in pairs
        ):
            (a_min, a_max), (b_min, b_max) = pairs
            if a_min == a_max:
                raise LoRKDError(f"intensity: its range is empty, {(a_min, a_max)}")
            return [ScaleIntensityRange(float(a_min), float(a_max), float(b_min), float(b_max))]
    raise LoRKDError(
        "intensity must be 'auto', 'same', 'zscore' or {'range': [a_min, a_max], 'to': [b_min, b_max]}, got "
        f"{intensity!r}"
    )
