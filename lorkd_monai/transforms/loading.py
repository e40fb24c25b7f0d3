"""Reading one item: from a file with MONAI's readers, or from an array of an ``.npz`` file."""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, LoadImage, LoadImaged
from PIL import Image

from lorkd_monai.errors import LoRKDError, root_cause
from lorkd_monai.transforms.dicom import VOLUMES, compiled, is_dicom, series_fault
from lorkd_monai.transforms.gate import affine_fault, refusal

__all__ = ["PICTURES", "SUFFIXES", "ImageFacts", "ItemLoader", "describe_image", "wrap_array"]

SUFFIXES = {
    2: (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp"),
    3: VOLUMES,
}
"""Suffixes of files that are taken for images, by spatial dimensions; DICOM files are recognised by `is_dicom`."""
PICTURES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")
"""How files of pictures begin, by which those without a suffix are recognised."""
_NIFTI_SUFFIXES = (".nii", ".nii.gz")


@dataclass(frozen=True)
class ImageFacts:
    """What can be known of an image without its preprocessing; ``spacing`` is in mm along the axes of RAS.

    ``values`` are the least and the greatest value of a 2D image (or of all in an ``.npz`` file) whose data type does
    not give the range; None for unsigned 8 and 16 bits. ``floats``: these are floats.
    """

    spatial_dims: int
    channels: int
    bits: int
    spacing: tuple[float, ...] | None
    values: tuple[float, float] | None = None
    floats: bool = False


def wrap_array(array: np.ndarray, spatial_dims: int, channels: int | None = None) -> MetaTensor:
    """Return an array as `LoadImaged` would have returned it from a file that holds it.

    Args:
        array: H×W[×C] or H×W×D[×C]; the channels come last.
        spatial_dims: 2 or 3.
        channels: how many there are without alpha. None takes a fourth (or second) one of unsigned numbers in 2D for
            alpha.

    Raises:
        LoRKDError: for an array with another number of axes.
    """
    extra = array.ndim - spatial_dims
    if extra not in (0, 1):
        raise LoRKDError(
            f"expected {spatial_dims} axes, or one more for channels, got an array of shape {array.shape}."
        )
    array = drop_alpha(array, channels) if extra and spatial_dims == 2 else array
    tensor = torch.as_tensor(np.ascontiguousarray(array).astype(np.float32))
    affine = torch.eye(spatial_dims + 1, dtype=torch.float64)
    meta = {
        "original_channel_dim": -1 if extra else float("nan"),
        "original_affine": affine.clone(),
        "spatial_shape": np.asarray(array.shape[:spatial_dims]),
        "mode": {"u1": "L", "u2": "I;16"}.get(array.dtype.str[1:], "F" if array.dtype.kind == "f" else "I"),
    }
    return MetaTensor(tensor, affine=affine, meta=meta)


def drop_alpha(array: np.ndarray, channels: int | None) -> np.ndarray:
    """Return one or more 2D images, …×C, without the channel of alpha that they may have beside their ``channels``."""
    if channels is None:
        channels = array.shape[-1] - (array.shape[-1] in (2, 4) and array.dtype.kind == "u")
    return array[..., :-1] if array.shape[-1] == channels + 1 and channels in (1, 3) else array


def describe_image(path: str | Sequence[str]) -> ImageFacts:
    """Return an image's `ImageFacts`: from its header (NIfTI, PNG, JPEG, …), else by reading it with MONAI.

    A list of files is one image with a file for each channel.

    Raises:
        LoRKDError: where the file cannot be read.
    """
    if not isinstance(path, str):
        facts = describe_image(path[0])
        return dataclasses.replace(facts, channels=len(path))
    _check_series(path)
    try:
        if path.lower().endswith(SUFFIXES[2]):
            return _describe_pil(path)
        if path.lower().endswith(_NIFTI_SUFFIXES):
            return _describe_nifti(path)
        if is_dicom(path):
            return _describe_dicom(path)
        return _describe_loaded(path)
    except LoRKDError:
        raise
    except Exception as error:  # each reader raises its own kinds
        raise LoRKDError(_cannot_read(path, error)) from error


class ItemLoader:
    """Apply preprocessing configs to items whose image is a file or an array.

    Args:
        configs: dictionaries of `lorkd_monai.transforms.preprocessing`, which begin with ``LoadImaged``.
        spatial_dims: 2 or 3.
        channels: of arrays, see `wrap_array`.
        source: what an array is called in messages.

    Example::

        >>> load = ItemLoader(preprocessing(task, "classification", 2, in_channels=3, image_size=64), 2)
        >>> load({"image": "scan.png"})["image"].shape
        torch.Size([3, 64, 64])
        >>> load({"image": np.full((28, 28), 128, "uint8")})["image"].shape
        torch.Size([3, 64, 64])
    """

    def __init__(
        self,
        configs: Sequence[dict[str, Any]],
        spatial_dims: int,
        channels: int | None = None,
        source: str = "an array",
    ) -> None:
        with quiet_readers():
            transforms = compiled(list(configs))
        self.spatial_dims, self.channels, self.source = spatial_dims, channels, source
        self.files = Compose([t for t in transforms if isinstance(t, LoadImaged)])
        self.rest = Compose([t for t in transforms if not isinstance(t, LoadImaged)])
        self._reader = compiled(configs[0].get("reader"))

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Return the item with its tensors. Raises a `LoRKDError` that names the file where that fails."""
        if isinstance(item["image"], str):
            _check_series(item["image"])
        try:
            if isinstance(item["image"], np.ndarray):
                image = wrap_array(item["image"], self.spatial_dims, self.channels)
                image.meta["filename_or_obj"] = self.source
                item = {**item, "image": image}
            else:
                item = self.files(item)
        except Exception as error:
            raise LoRKDError(refusal(error) or _cannot_read(_names(item), error)) from error
        try:
            return self.rest(item)
        except Exception as error:
            words = refusal(error) or f"cannot preprocess {_names(item)}: {root_cause(error)}"
            raise LoRKDError(words) from error

    def read_small(self, path: str, size: Sequence[int]) -> np.ndarray | None:
        """Return the array H×W[×C] of a 2D file no larger than ``size``; None for others and what cannot be read."""
        try:
            with Image.open(path) as header:
                if header.height > size[0] or header.width > size[1]:
                    return None
            return self._reader.get_data(self._reader.read(path))[0]
        except Exception:  # __call__ then says what is wrong, or reads it in another way
            return None


@contextmanager
def quiet_readers() -> Iterator[None]:
    """Silence MONAI's note, for each new `LoadImaged`, that a GPU decoder of DICOM is not installed."""
    logger = logging.getLogger("monai.data.nvimgcodec_pydicom_plugin")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="NvImgCodecPydicomReader")
            yield
    finally:
        logger.disabled = before


def _check_series(path: str) -> None:
    fault = _series_fault(path, os.stat(path).st_mtime_ns) if os.path.isdir(path) else ""
    if fault:
        raise LoRKDError(fault)


@lru_cache(maxsize=65536)
def _series_fault(folder: str, changed: int) -> str:
    """`series_fault`, which reads the header of every slice: once for a folder, not each time that it is read."""
    return series_fault(folder)


def _describe_loaded(path: str) -> ImageFacts:
    with quiet_readers():
        image = LoadImage(image_only=True, ensure_channel_first=True)(path)
    return ImageFacts(image.ndim - 1, image.shape[0], 0, _ras_spacing(np.asarray(image.affine)))


def _describe_pil(path: str) -> ImageFacts:
    with Image.open(path) as image:
        mode = image.mode
        values: Any = tuple(map(float, image.getextrema())) if mode in ("I", "F") else None
    channels = 1 if mode in ("1", "L", "LA", "La", "F") or mode.startswith("I") else 3
    bits = 16 if mode.startswith("I;16") else 32 if values else 8
    return ImageFacts(2, channels, bits, None, values, mode == "F")


def _describe_dicom(path: str) -> ImageFacts:
    """Facts of one file: a picture, or a volume in one file."""
    import pydicom

    header = pydicom.dcmread(path, force=True, stop_before_pixels=True)
    if int(header.get("NumberOfFrames") or 1) > 1:
        return _describe_loaded(path)
    grey = str(header.get("PhotometricInterpretation", "MONOCHROME2")).startswith("MONOCHROME")
    # A picture is scaled to the range of its task, whatever its own depth.
    return ImageFacts(2, 1 if grey else 3, 8, None)


def _describe_nifti(path: str) -> ImageFacts:
    import nibabel

    image = nibabel.load(path)
    fault = affine_fault(torch.as_tensor(image.affine))
    if fault:
        raise LoRKDError(f"{path}{fault}")
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    channels = shape[3] if len(shape) > 3 else 1
    bits = 8 * image.get_data_dtype().itemsize
    return ImageFacts(min(len(shape), 3), int(channels), bits, _ras_spacing(image.affine))


def _ras_spacing(affine: np.ndarray) -> tuple[float, ...]:
    import nibabel

    lengths = np.linalg.norm(affine[:-1, :-1], axis=0)
    if len(lengths) != 3:
        return tuple(float(length) for length in lengths)
    world_axes = nibabel.io_orientation(affine)[:, 0].astype(int)
    spacing = np.empty(3)
    spacing[world_axes] = lengths
    return tuple(float(length) for length in spacing)


def _names(item: dict[str, Any]) -> str:
    def name(value: Any) -> str:
        if isinstance(value, MetaTensor):
            return str(value.meta.get("filename_or_obj", "an array"))
        if isinstance(value, (np.ndarray, torch.Tensor)):
            return "an array"
        return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

    names = [name(item["image"])]
    if isinstance(item.get("label"), (str, Path, MetaTensor)):
        names.append(name(item["label"]))
    return " with mask ".join(names)


def _cannot_read(names: str, error: Exception) -> str:
    message = f"cannot read {names}: {root_cause(error)}"
    return f"{message}\nThe file may be damaged, or of another format than its name says."
