"""Writes DICOM files of one picture, as hospitals' devices do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid


def write_picture(path: Path, pixels: np.ndarray, photometric: str | None = None, **tags: Any) -> Path:
    """Write rows × columns [× 3] (or frames × rows × columns, with the tag NumberOfFrames) as one DICOM file."""
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data.StudyInstanceUID, data.SeriesInstanceUID, data.Modality = generate_uid(), generate_uid(), "DX"
    size = pixels.shape[1:] if "NumberOfFrames" in tags else pixels.shape
    data.Rows, data.Columns = size[:2]
    data.SamplesPerPixel = 3 if len(size) == 3 else 1
    data.PhotometricInterpretation = photometric or ("RGB" if len(size) == 3 else "MONOCHROME2")
    if len(size) == 3:
        data.PlanarConfiguration = 0
    data.BitsAllocated = data.BitsStored = 8 * pixels.itemsize
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelData = np.ascontiguousarray(pixels).tobytes()
    for keyword, value in tags.items():
        setattr(data, keyword, value)
    data.HighBit = data.BitsStored - 1
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def table(values: np.ndarray, bits: int) -> pydicom.Sequence:
    """A lookup table, for ModalityLUTSequence or VOILUTSequence."""
    item = pydicom.Dataset()
    item.LUTDescriptor = [len(values), 0, bits]
    item.add_new("LUTData", "OW", values.astype("uint16").tobytes())
    return pydicom.Sequence([item])
