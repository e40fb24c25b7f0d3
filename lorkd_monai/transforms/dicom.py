"""DICOM files as hospitals have them: which files are DICOM, and how one becomes a picture.

A picture is what a viewer shows: pydicom applies the modality LUT or rescale and the VOI LUT or window, MONOCHROME1 is
inverted, YBR and palettes become RGB. All of it is expressions for the configs of expert bundles, which
need only MONAI and pydicom (2.4 or 3); training evaluates the same text.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

__all__ = ["IS_DICOM", "SERIES_FAULT", "VOLUMES", "compiled", "is_dicom", "is_series", "picture_reader", "series_fault"]

VOLUMES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd")
"""Suffixes of files that are taken for volumes."""

IS_DICOM = (
    "lambda path: monai.utils.optional_import('os')[0].path.isfile(path) and not path.endswith('DICOMDIR') and ("
    "path.lower().endswith(('.dcm', '.dicom', '.ima')) or open(path, 'rb').read(132)[128:] == b'DICM')"
)
"""A file is DICOM by its name, or by the letters after its first 128 bytes. DICOMDIR is a table of contents."""

# The position of a slice, from its header: ITK stacks the files of a series and takes the first distance for all.
_POSITION = (
    "(lambda io, file: (io.SetFileName(file), io.ReadImageInformation(), [io.GetOrigin(axis) for axis in range(3)])"
    "[-1])(itk.GDCMImageIO.New(), file)"
)
_UNEVEN = (
    "(lambda places, steps: f'{folder!r} holds {len(files)} slices of {len(places)} places; keep one of each, or give "
    "each volume of several a folder of its own' if len(places) < len(files) else f'the slices of {folder!r} lie "
    "{steps.min():.4g} to {steps.max():.4g} mm apart; a slice is missing after {files[int(steps.argmax())]}' if "
    "steps.max() > 1.5 * np.median(steps) else '')(*(lambda found: (set(map(tuple, found.round(3))), np.linalg.norm("
    f"np.diff(found, axis=0), axis=1)))(np.array([{_POSITION} for file in files])))"
)
_VOLUME_BESIDE = (
    "next((f'{folder!r} holds DICOM slices and the volume {name!r}; keep one of them, or give each a folder of its "
    "own' for name in sorted(monai.utils.optional_import('os')[0].listdir(folder)) if series and name[0] != '.' and "
    f"name.lower().endswith({VOLUMES})), '')"
)
SERIES_FAULT = (
    "lambda folder: (lambda itk, names: (names.SetUseSeriesDetails(True), names.AddSeriesRestriction('0008|0021'), "
    "names.SetDirectory(folder), (lambda series: f'{folder!r} holds {len(series)} DICOM series, expected one; put each "
    "into a folder of its own: ' + ', '.join(f'{len(files)} files from {files[0]}' for files in series) if len(series) "
    f"> 1 else {_VOLUME_BESIDE} or next((fault for files in series if len(files) > 1 for fault in [{_UNEVEN}]), ''))("
    "[list(names.GetFileNames(uid)) for uid in names.GetSeriesUIDs()]))[-1])(*(lambda itk: (itk, "
    "itk.GDCMSeriesFileNames.New()))(monai.utils.optional_import('itk')[0]))"
)
"""What is wrong with a folder of DICOM files that is to be one volume. MONAI reads only the first series in it."""

# What a picture must not be: each fault with its words.
_FAULTS = {
    "'PixelData' not in dicom": "holds no image",
    "int(dicom.get('NumberOfFrames') or 1) > 1": "holds several frames, expected one; save each as a file",
    "not (kind in ('MONOCHROME1', 'MONOCHROME2', 'PALETTE COLOR') or dicom.BitsAllocated == 8 and kind in ('RGB', "
    "'YBR_FULL', 'YBR_FULL_422', 'YBR_ICT', 'YBR_RCT'))": "is not grey, RGB, YBR of 8 bits or of a palette; convert it",
    "new and not lut.get_decoder(dicom.file_meta.TransferSyntaxUID).is_available": "is compressed in a way that "
    "nothing installed here can decode; install pylibjpeg with its libraries, or decompress it (gdcmconv --raw)",
}
_FAULT = "".join(f"'{words}' if {fault} else " for fault, words in _FAULTS.items()) + "''"
_CHECK = f"(lambda fault: torch._check_value(not fault, lambda: f'refused: {{path}} {{fault}}'))({_FAULT})"
_PALETTE = (
    "(lambda x: (x[..., :3] >> 8 * (x.itemsize - 1)).astype('uint8'))(lut.apply_color_lut(dicom.pixel_array, dicom))"
)
# pydicom 3 converts these to RGB itself.
_COLOURS = (
    "(lut.convert_color_space(dicom.pixel_array, kind, 'RGB') if not new and kind[:8] == 'YBR_FULL' else "
    "dicom.pixel_array)"
)
_VALUES = "lut.apply_modality_lut(dicom.pixel_array, dicom)"
# 0 to 1: pydicom leaves what is shown in the range that a table's depth says, or that of stored numbers, rescaled.
_SHOWN = (
    "(lambda x, voi, half: (lambda x, ends: (x - ends[0]) / (ends[1] - ends[0]))(lut.apply_voi_lut(x.astype('int64') "
    "if voi else x, dicom), (lambda table: (0, 2.0 ** table[0].LUTDescriptor[2] - 1) if table else "
    "lut.apply_modality_lut(np.array([-half, half - 1]) + half * (1 - dicom.PixelRepresentation), dicom))(voi or "
    f"dicom.get('ModalityLUTSequence'))))({_VALUES}, dicom.get('VOILUTSequence'), 2.0 ** (dicom.BitsStored - 1))"
)


def picture_reader(convert: str, limits: Sequence[float] | None, own_depth: bool) -> str:
    """Return the expression of a reader of 2D images: PIL's, which reads DICOM files too.

    Args:
        convert: the expression of a function of a PIL image.
        limits: the range of the task, None for percentiles. Where it is 0 to 1, 255 or 65535, a grey DICOM file is read
            as it is shown; else its values after the rescale are taken, and MONOCHROME1 is inverted within the range.
        own_depth: the shown picture gets 16 bits, which the gate scales to the range; else it has that range.
    """
    low, high = limits or (0, 0)
    shown = low == 0 and high in (1, 255, 65535)
    high = 65535 if shown and own_depth else high
    grey = f"{_SHOWN}.clip(0, 1) * {high:g}" if shown else _VALUES
    kind = ".round().astype('uint16')" if shown and own_depth else ".astype('float32')"
    grey = f"(lambda x: {low + high:g} - x if kind == 'MONOCHROME1' else x)({grey}){kind}"
    picture = (
        f"(lambda dicom, lut, new: (lambda kind: ({_CHECK}, optional('PIL.Image')[0].fromarray({_PALETTE} if kind == "
        f"'PALETTE COLOR' else {_COLOURS} if dicom.SamplesPerPixel == 3 else {grey}))[-1])(str(dicom.get("
        "'PhotometricInterpretation'))))(optional('pydicom')[0].dcmread(path, force=True), *(optional('pydicom.pixels')"
        " if optional('pydicom.pixels')[1] else (optional('pydicom.pixel_data_handlers')[0], False)))"
    )
    # Only what `read` refuses is tried with MONAI's other readers: what is no good picture is found in `get_data`.
    return (
        "$(lambda pil, optional: type('PictureReader', (pil,), {'read': lambda self, data, **options: [path if "
        f"({IS_DICOM})(path) else pil.read(self, path, **options) for path in monai.utils.ensure_tuple(data)], "
        f"'get_data': lambda self, images: pil.get_data(self, [(lambda path: {picture})(image) if isinstance("
        f"image, str) else ({convert[1:]})(image) for image in images])}}))(monai.data.PILReader, "
        "monai.utils.optional_import)(reverse_indexing=False)"
    )


def compiled(rule: Any) -> Any:
    """Return what MONAI makes of an expression, or another value, of a config."""
    return ConfigParser({"rule": rule}).get_parsed_content("rule")


_is_dicom = compiled(f"${IS_DICOM}")
series_fault = compiled(f"${SERIES_FAULT}")


def is_dicom(path: str | os.PathLike[Any]) -> bool:
    """Say whether a file is DICOM, by its name or its content."""
    return bool(_is_dicom(os.fspath(path)))


def is_series(folder: str | os.PathLike[Any]) -> bool:
    """Say whether a folder holds DICOM files, which makes it a volume."""
    return os.path.isdir(folder) and any(map(is_dicom, sorted(Path(folder).iterdir())))
