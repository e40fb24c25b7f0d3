"""Writes DICOM series from arrays; run by the Python of the Deploy environment: python dicom_files.py OUT SPEC.json.

SPEC is a list of series: {"folder", "image" (NIfTI, or PNG for one slice), "tags"}. Slices are written in a shuffled
order with shuffled names, so that nothing can rely on it.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

STORAGE = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "DX": "1.2.840.10008.5.1.4.1.1.1.1",
    "US": "1.2.840.10008.5.1.4.1.1.6.1",
}


def _dataset(path: Path, pixels: np.ndarray, tags: dict, uids: dict) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = STORAGE.get(tags["Modality"], STORAGE["CT"])
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.PatientID, data.PatientName, data.PatientBirthDate, data.PatientSex = "P1", "Phantom", "", "O"
    data.StudyID, data.StudyDate, data.StudyTime, data.AccessionNumber = "1", "20260101", "120000", "A1"
    data.SeriesDate, data.SeriesTime, data.ContentDate, data.ContentTime = "20260101", "120000", "20260101", "120000"
    data.ReferringPhysicianName, data.Manufacturer, data.SeriesNumber = "", "none", 1
    for keyword, value in {**uids, **tags}.items():
        setattr(data, keyword, value)
    data.Rows, data.Columns = pixels.shape[:2]
    colour, deep = pixels.ndim == 3, pixels.dtype != np.uint8
    data.SamplesPerPixel, data.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    if colour:
        data.PlanarConfiguration = 0
    data.BitsAllocated = data.BitsStored = 16 if deep else 8
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(pixels.dtype == np.int16)
    data.PixelData = np.ascontiguousarray(pixels).tobytes()
    return data


def write_volume(folder: Path, image: Path, tags: dict, study: str) -> None:
    """Write a NIfTI volume of whole numbers as a DICOM series of axial (or oblique) slices."""
    nifti = nibabel.load(image)
    values, affine = np.asarray(nifti.dataobj), np.diag([-1.0, -1.0, 1.0, 1.0]) @ nifti.affine
    assert np.array_equal(values, values.astype(np.int16)), "DICOM holds whole numbers"
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    directions = affine[:3, :3] / spacing
    assert np.allclose(np.cross(directions[:, 0], directions[:, 1]) @ directions[:, 2], 1, atol=1e-6), "right-handed"
    uids = {"StudyInstanceUID": study, "SeriesInstanceUID": generate_uid(), "FrameOfReferenceUID": generate_uid()}
    names = list(range(values.shape[2]))
    random.Random(0).shuffle(names)
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(values.shape[2]):
        path = folder / f"{names[k]:03d}.dcm"
        data = _dataset(path, values[:, :, k].T.astype(np.int16), tags, uids)
        # Text of at most 16 characters: rounded here, once, so that all slices agree.
        data.ImageOrientationPatient = [f"{v:.10f}"[:16] for v in (*directions[:, 0], *directions[:, 1])]
        data.ImagePositionPatient = [f"{v:.8f}"[:16] for v in affine[:3, 3] + k * affine[:3, 2]]
        data.PixelSpacing = [f"{spacing[1]:.8f}", f"{spacing[0]:.8f}"]
        data.SliceThickness, data.InstanceNumber = f"{spacing[2]:.6f}", k + 1
        data.RescaleIntercept, data.RescaleSlope = "0", "1"
        data.save_as(path, enforce_file_format=True)


def write_picture(folder: Path, image: Path, tags: dict, study: str) -> None:
    """Write a picture as one DICOM image: 8 bits, grey or RGB."""
    pixels = np.asarray(Image.open(image))
    uids = {"StudyInstanceUID": study, "SeriesInstanceUID": generate_uid()}
    folder.mkdir(parents=True, exist_ok=True)
    data = _dataset(folder / "0.dcm", pixels, tags, uids)
    data.InstanceNumber, data.PatientOrientation = 1, ""
    data.save_as(folder / "0.dcm", enforce_file_format=True)


def main(out: Path, spec: list[dict]) -> None:
    studies: dict[str, str] = {}
    for series in spec:
        image = Path(series["image"])
        study = studies.setdefault(series.get("study", "one"), generate_uid())
        write = write_volume if image.name.endswith((".nii", ".nii.gz")) else write_picture
        write(out / series["folder"], image, series["tags"], study)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
