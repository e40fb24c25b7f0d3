"""Giving a teacher the intensities that it was trained on, from the images that the student sees.

Student and teacher see one augmented sample. The student's images are the data's values v, brought to 0..1 by the
task's range: x = (v - low) / (high - low), cut off outside. A teacher from elsewhere wants other numbers, which its
bundle's preprocessing tells; where these are a straight line of v they are one of x, too::

    ScaleIntensityRange(a_min, a_max, b_min, b_max):  t = (v - a_min) / (a_max - a_min) · (b_max - b_min) + b_min
    NormalizeIntensity(subtrahend, divisor):          t = (v - subtrahend) / divisor
    NormalizeIntensity():                             t = (x - mean(x)) / std(x), the same for v and x
    ScaleIntensity(minv, maxv):                       t = (x - min(x)) / (max(x) - min(x)) · (maxv - minv) + minv

What the student's range cuts off, the teacher doesn't see either, and the last two take their figures from the
student's patch and not from the whole image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorkd_monai.errors import LoRKDError

__all__ = ["Intensity", "find_intensity"]

Range = tuple[float, float]
_STEPS = ("ScaleIntensityRange", "NormalizeIntensity", "ScaleIntensity")
_OTHERS = (
    "ScaleIntensityRangePercentiles", "AdjustContrast", "HistogramNormalize", "ThresholdIntensity", "ClipIntensity",
    "ClipIntensityPercentiles", "ShiftIntensity", "StdShiftIntensity", "ScaleIntensityFixedMean",
)  # fmt: skip


@dataclass(frozen=True)
class Intensity:
    """What becomes of the student's images on their way to the teacher.

    Args:
        gain, offset: of each task, in the order of the tasks: x · gain + offset.
        low, high: limits of the result, where the teacher's own preprocessing has some.
        statistics: None, ``"zscore"`` or ``"minmax"``: taken of each image after that.
        nonzero: the statistics of voxels that are not 0 alone; the others stay 0.
        channel_wise: each channel by itself.
        to: range of ``"minmax"``.
    """

    gain: Sequence[float]
    offset: Sequence[float]
    low: float | None = None
    high: float | None = None
    statistics: str | None = None
    nonzero: bool = False
    channel_wise: bool = False
    to: Range = field(default=(0.0, 1.0))

    def __call__(self, x: Tensor, tasks: Sequence[int]) -> Tensor:
        """The teacher's images: B×C×…, the task of each row in ``tasks``."""
        shape = [-1] + [1] * (x.ndim - 1)
        gain, offset = (x.new_tensor([v[t] for t in tasks]).view(shape) for v in (self.gain, self.offset))
        y = x * gain + offset
        if self.low is not None or self.high is not None:
            y = y.clamp(self.low, self.high)
        if self.statistics is None:
            return y
        return torch.stack([self._with_statistics(image) for image in y])

    def _with_statistics(self, image: Tensor) -> Tensor:
        if self.channel_wise:
            return torch.stack([self._of(channel) for channel in image])
        return self._of(image)

    def _of(self, image: Tensor) -> Tensor:
        chosen = image != 0 if self.nonzero else torch.ones_like(image, dtype=torch.bool)
        values = image[chosen]
        if not len(values):
            return image
        if self.statistics == "zscore":
            spread = values.std(correction=0)
            scaled = (image - values.mean()) / (spread if spread > 0 else 1.0)
        else:
            span = values.max() - values.min()
            if span == 0:
                return image * self.to[0]  # as MONAI's ScaleIntensity
            scaled = (image - values.min()) / span * (self.to[1] - self.to[0]) + self.to[0]
        return torch.where(chosen, scaled, image)


def find_intensity(
    steps: Sequence[Mapping], ranges: Mapping[str, Range | None], key: str = "image", source: str = "the teacher"
) -> Intensity | None:
    """Read what a preprocessing does to the intensities of an image.

    Args:
        steps: MONAI configs of its transforms, with ``_target_``.
        ranges: task -> the data's values that the student sees as 0 and 1, in the order of the tasks; None where they
            differ from image to image (percentiles).
        key: the image's key; steps on other keys alone are passed over.
        source: for messages.

    Returns:
        None where no step changes intensities: the student's images are then the teacher's.

    Raises:
        LoRKDError: a step that changes intensities in a way that can't be followed, or that needs the data's own
            values where a task has none; say it yourself then, with ``intensity=…``.
    """
    found = None
    for step in steps:
        name = str(step.get("_target_", "")).rpartition(".")[2].removesuffix("d").removesuffix("Dict")
        keys = step.get("keys", [key])
        if step.get("_disabled_") is True or key not in ([keys] if isinstance(keys, str) else list(keys)):
            continue
        if name in _OTHERS or (name in _STEPS and found is not None):
            raise _cannot(source, f"{name} {'after another step' if name in _STEPS else ''}".strip())
        if name in _STEPS:
            found = _read_step(name, step, ranges, source)
    return found


def _cannot(source: str, what: str) -> LoRKDError:
    return LoRKDError(
        f"{source} prepares its images with {what}, which can't be followed from the student's images: say what it "
        "wants with intensity={'range': [a_min, a_max], 'to': [b_min, b_max]}, 'zscore', or 'same'"
    )


def _read_step(name: str, step: Mapping, ranges: Mapping[str, Range | None], source: str) -> Intensity:
    numbers = {k: v for k, v in step.items() if k in ("a_min", "a_max", "b_min", "b_max", "minv", "maxv")}
    if any(v is not None and not isinstance(v, (int, float)) for v in numbers.values()):
        raise _cannot(source, f"{name} with values that are no numbers")
    same = {"gain": [1.0] * len(ranges), "offset": [0.0] * len(ranges)}
    if name == "ScaleIntensityRange":
        a_min, a_max = float(step["a_min"]), float(step["a_max"])
        b_min, b_max = step.get("b_min"), step.get("b_max")
        to = (0.0, 1.0) if b_min is None or b_max is None else (float(b_min), float(b_max))  # as MONAI does
        limits = (b_min, b_max) if step.get("clip", False) else (None, None)
        return _line((a_min, a_max), to, ranges, source, limits)
    if name == "ScaleIntensity":
        if step.get("factor") is not None and step.get("minv", 0.0) is None:
            raise _cannot(source, "ScaleIntensity by a factor")
        to = (float(step.get("minv", 0.0)), float(step.get("maxv", 1.0)))
        return Intensity(**same, statistics="minmax", channel_wise=bool(step.get("channel_wise", False)), to=to)
    subtrahend, divisor = step.get("subtrahend"), step.get("divisor")
    if isinstance(subtrahend, (int, float)) and isinstance(divisor, (int, float)) and not step.get("nonzero"):
        return _line((subtrahend, subtrahend + divisor), (0.0, 1.0), ranges, source)
    if subtrahend is not None or divisor is not None:
        raise _cannot(
            source, "NormalizeIntensity with a subtrahend or divisor for each channel, or for non-zero voxels"
        )
    nonzero = bool(step.get("nonzero", False))
    if nonzero and any(r is None or r[0] != 0 for r in ranges.values()):
        raise _cannot(source, "NormalizeIntensity of non-zero voxels, while the student's 0 is not the data's")
    channel_wise = bool(step.get("channel_wise", False))
    return Intensity(**same, statistics="zscore", nonzero=nonzero, channel_wise=channel_wise)


def _line(
    values: Range,
    to: Range,
    ranges: Mapping[str, Range | None],
    source: str,
    limits: tuple[float | None, float | None] = (None, None),
) -> Intensity:
    """The line that brings the data's ``values`` to ``to``, as one of the student's images."""
    unknown = [name for name, own in ranges.items() if own is None]
    if unknown:
        raise LoRKDError(
            f"{source} wants intensities from {values[0]:g} to {values[1]:g}, but the images of {', '.join(unknown)} "
            'are scaled by their own percentiles: give these tasks an "intensity": {"range": [low, high]} in the '
            "data list, or say intensity='same' or 'zscore'"
        )
    if values[0] == values[1]:
        raise LoRKDError(f"{source}: its range of intensities is empty, {values}")
    slope = (to[1] - to[0]) / (values[1] - values[0])
    gain = [slope * (high - low) for low, high in ranges.values()]
    offset = [slope * (low - values[0]) + to[0] for low, _ in ranges.values()]
    return Intensity(gain, offset, *limits)


def given_intensity(
    intensity: str | Mapping, ranges: Mapping[str, Range | None], source: str = "intensity"
) -> Intensity | None:
    """What a user says: ``"same"``, ``"zscore"``, or ``{"range": [a_min, a_max], "to": [b_min, b_max]}``.

    Raises:
        LoRKDError: something else.
    """
    if intensity == "same":
        return None
    if intensity == "zscore":
        return _read_step("NormalizeIntensity", {}, ranges, source)
    if isinstance(intensity, Mapping) and set(intensity) <= {"range", "to"} and "range" in intensity:
        pairs = [intensity["range"], intensity.get("to", [0.0, 1.0])]
        if all(
            isinstance(p, (list, tuple)) and len(p) == 2 and all(isinstance(v, (int, float)) for v in p) for p in pairs
        ):
            values, to = ((float(p[0]), float(p[1])) for p in pairs)
            return _line(values, to, ranges, source)
    raise LoRKDError(
        "intensity must be 'auto', 'same', 'zscore' or {'range': [a_min, a_max], 'to': [b_min, b_max]}, got "
        f"{intensity!r}"
    )
