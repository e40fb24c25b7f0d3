"""Read DICOM for the experts: the tags for routing, and volumes with their geometry.

Volumes are read with pydicom: the SDK takes the number type of a volume from its first slice alone, and swaps the two
pixel spacings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor

from .dicom_rules import TAGS
from .shared_weights import ExpertError

__all__ = ["check_uid", "tags_of", "volume"]

_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def check_uid(uid: Any) -> str:
    """Return a valid UID; it becomes the name of a folder."""
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)*", str(uid)) or len(str(uid)) > 64:
        raise ExpertError(f"expected a DICOM UID of digits and dots, got {str(uid)!r}")
    return str(uid)


def tags_of(dataset: Any) -> dict[str, str]:
    """The tags that rules use, as text, without absent ones."""
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
            raise ExpertError(f"a slice of the series has no {keyword}, so its position in space is unknown")
    first = datasets[0]
    directions = np.array([float(v) for v in first.ImageOrientationPatient]).reshape(2, 3)
    same = [
        np.allclose([float(v) for v in d.ImageOrientationPatient], directions.flatten(), atol=1e-4)
        and (d.Rows, d.Columns) == (first.Rows, first.Columns)
        and np.allclose([float(v) for v in d.PixelSpacing], [float(v) for v in first.PixelSpacing], rtol=1e-4)
        for d in datasets
    ]
    if not all(same):
        raise ExpertError(
            "the slices of the series differ in orientation, size or pixel spacing: they are not one volume"
        )
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
    array = np.stack(slices, axis=-1)
    meta = {"original_channel_dim": "no_channel", "spatial_shape": np.array(array.shape)}
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return MetaTensor(tensor, affine=torch.from_numpy(_TO_RAS @ affine), meta=meta), order
