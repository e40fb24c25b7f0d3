"""What the experts need of DICOM files: tags to route by, volumes with their geometry, pictures.

Read with pydicom itself: the SDK's own volume takes its number type from the first slice alone, and exchanges the two
pixel spacings where they differ.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor

from .pool import ExpertError
from .routing import TAGS

__all__ = ["check_uid", "picture", "tags_of", "volume"]

_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def check_uid(uid: Any) -> str:
    """Return a UID that is one: it becomes the name of a folder."""
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)*", str(uid)) or len(str(uid)) > 64:
        raise ExpertError(f"expected a DICOM UID of digits and dots, got {str(uid)!r}")
    return str(uid)


def tags_of(dataset: Any) -> dict[str, str]:
    """The tags that rules look at, as text; absent ones are left out."""
    return {tag: str(dataset.get(tag)) for tag in TAGS if dataset.get(tag)}


def _values(dataset: Any) -> np.ndarray:
    """Stored values with rescale slope and intercept: HU for CT."""
    from pydicom.pixels import apply_modality_lut

    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise ExpertError("multi-frame DICOM is not supported; convert it to one file for each frame")
    return np.asarray(apply_modality_lut(dataset.pixel_array, dataset))


def volume(datasets: Sequence[Any]) -> tuple[MetaTensor, list[int]]:
    """Return a series as a volume (columns × rows × slices, affine in mm, RAS) and the datasets' order in it.

    Raises:
        ExpertError: fewer than 2 slices, slices of several orientations or sizes, missing ones, or colours.
    """
    if len(datasets) < 2:
        raise ExpertError(f"a volume needs at least 2 slices, the series has {len(datasets)}")
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        if any(not dataset.get(keyword) for dataset in datasets):
            raise ExpertError(f"a slice of the series has no {keyword}, so that its place in space is not known")
    first = datasets[0]
    directions = np.array([float(v) for v in first.ImageOrientationPatient]).reshape(2, 3)
    same = [
        np.allclose([float(v) for v in d.ImageOrientationPatient], directions.flatten(), atol=1e-4)
        and (d.Rows, d.Columns) == (first.Rows, first.Columns)
        and np.allclose([float(v) for v in d.PixelSpacing], [float(v) for v in first.PixelSpacing], rtol=1e-4)
        for d in datasets
    ]
    if not all(same):
        raise ExpertError("the slices of the series differ in orientation, size or pixel spacing: it is no one volume")
    if first.get("PhotometricInterpretation") != "MONOCHROME2":
        raise ExpertError(f"a volume must be MONOCHROME2, got {first.get('PhotometricInterpretation')!r}")
    positions = np.array([[float(v) for v in d.ImagePositionPatient] for d in datasets])
    depth = positions @ np.cross(*directions)
    order = [int(i) for i in np.argsort(depth)]
    steps = np.diff(depth[order])
    if steps.min() <= 0 or steps.max() - steps.min() > 0.1 * np.median(steps):
        raise ExpertError(
            f"the slices of the series are {steps.min():.3f} to {steps.max():.3f} mm apart: expected equal steps; "
            "slices are missing, or the series holds more than one volume"
        )
    rows, columns = (float(v) for v in first.PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = directions[0] * columns, directions[1] * rows
    affine[:3, 2] = (positions[order[-1]] - positions[order[0]]) / (len(order) - 1)
    affine[:3, 3] = positions[order[0]]
    slices = [_values(datasets[i]).astype(np.float32).T for i in order]
    return _tensor(np.stack(slices, axis=-1), _TO_RAS @ affine, "no_channel"), order


def picture(dataset: Any, limits: tuple[float, float] | None) -> MetaTensor:
    """Return one image as rows × columns [× 3], the values that the expert was trained on.

    Experts trained on 8-bit images (``limits`` within 0..255) get colours and 8-bit grey as stored, and deeper grey
    through the image's own window; the others get the stored values with their rescale.

    Raises:
        ExpertError: deeper grey without a linear window.
    """
    from pydicom.pixels import apply_color_lut, convert_color_space

    kind = str(dataset.get("PhotometricInterpretation"))
    if int(dataset.get("SamplesPerPixel") or 1) == 3:
        colours = dataset.pixel_array
        if int(dataset.get("NumberOfFrames") or 1) > 1:
            raise ExpertError("multi-frame DICOM is not supported; convert it to one file for each frame")
        if kind.startswith("YBR"):
            colours = convert_color_space(colours, kind, "RGB")
        return _tensor(colours.astype(np.float32), np.eye(4), -1)
    if kind == "PALETTE COLOR":
        colours = apply_color_lut(dataset.pixel_array, dataset)
        return _tensor((colours >> 8 if colours.dtype == np.uint16 else colours).astype(np.float32), np.eye(4), -1)
    values = _values(dataset).astype(np.float32)
    eight_bit = limits is not None and max(limits) <= 255
    if eight_bit and (int(dataset.BitsStored) > 8 or values.min() < 0 or values.max() > 255):
        values = _windowed(values, dataset)
    if kind == "MONOCHROME1":
        values = (255 if eight_bit else values.max() + values.min()) - values
    return _tensor(values, np.eye(4), "no_channel")


def _windowed(values: np.ndarray, dataset: Any) -> np.ndarray:
    """Grey values 0 to 255 through the image's first window."""
    from pydicom.multival import MultiValue

    center, width = dataset.get("WindowCenter"), dataset.get("WindowWidth")
    shape = str(dataset.get("VOILUTFunction") or "LINEAR")
    if center is None or width is None or shape not in ("LINEAR", "LINEAR_EXACT"):
        raise ExpertError(
            "the expert was trained on 8-bit images; a deeper grey image needs a linear window (WindowCenter and "
            "WindowWidth) to be shown as one, and this image has none"
        )
    center, width = (float(v[0] if isinstance(v, (list, MultiValue)) else v) for v in (center, width))
    # DICOM PS3.3 C.11.2.1.2: the linear function differs from the exact one by half a grey value.
    if shape == "LINEAR":
        center, width = center - 0.5, max(width - 1, 1.0)
    return (np.clip((values - center) / width + 0.5, 0.0, 1.0) * 255).round().astype(np.float32)


def _tensor(array: np.ndarray, affine: np.ndarray, channel: int | str) -> MetaTensor:
    meta = {"original_channel_dim": channel, "spatial_shape": np.array(array.shape[: 2 if channel == -1 else None])}
    return MetaTensor(torch.from_numpy(np.ascontiguousarray(array)), affine=torch.from_numpy(affine), meta=meta)
