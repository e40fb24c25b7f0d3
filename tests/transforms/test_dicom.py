"""DICOM files of one picture: the values that a viewer shows, by hand, against what training and experts read."""

from __future__ import annotations

import json

import numpy as np
import pydicom
import pytest
from dicom_pictures import table, write_picture
from monai.bundle import ConfigParser
from PIL import Image
from pydicom.pixels import convert_color_space

from lorkd_monai.errors import LoRKDError
from lorkd_monai.tasks import TaskSpec
from lorkd_monai.transforms import ItemLoader, describe_image, preprocessing
from lorkd_monai.transforms.dicom import is_dicom, is_series

RNG = np.random.default_rng(0)
SIZE = (12, 10)
DEEP = RNG.integers(0, 4096, SIZE).astype(np.uint16)
GREY = RNG.integers(0, 256, SIZE).astype(np.uint8)
COLOURS = RNG.integers(0, 256, (*SIZE, 3)).astype(np.uint8)
HU = RNG.integers(-1024, 2000, SIZE).astype(np.int16)
CURVE = (np.arange(4096) // 4)[::-1] ** 2 // 1023  # falls, 10 bits


def load(path, intensity=None, channels=1):
    """Read it as the stock configs say, which is what training does."""
    task = TaskSpec("task", 0, {0: "a", 1: "b"}, intensity=intensity)
    configs = json.loads(json.dumps(preprocessing(task, "classification", 2, channels, list(SIZE))))
    steps = ConfigParser({"steps": {"_target_": "Compose", "transforms": configs}}).get_parsed_content("steps")
    image = steps({"image": str(path)})["image"]
    assert image.meta["filename_or_obj"] == str(path)
    assert (ItemLoader(configs, 2)({"image": str(path)})["image"] == image).all()
    return image.numpy()


def window(values, center, width):
    """DICOM PS3.3 C.11.2.1.2, written out; 0 to 1."""
    inside = ((values - (center - 0.5)) / (width - 1) + 0.5).clip(0, 1)
    return np.where(
        values <= center - 0.5 - (width - 1) / 2, 0, np.where(values > center - 0.5 + (width - 1) / 2, 1, inside)
    )


PICTURES = {
    # what is written -> what is shown, 0 to 1
    "8 bits": ((GREY, None, {}), GREY / 255),
    "12 bits, no window": ((DEEP, None, {"BitsStored": 12}), DEEP / 4095),
    "12 bits, window": ((DEEP, None, {"BitsStored": 12, "WindowCenter": 2000, "WindowWidth": 1500}),
                        window(DEEP.astype(float), 2000, 1500)),
    "8 bits, window": ((GREY, None, {"WindowCenter": 100, "WindowWidth": 80}), window(GREY.astype(float), 100, 80)),
    "exact window": ((DEEP, None, {"BitsStored": 12, "WindowCenter": 2000, "WindowWidth": 1500,
                                   "VOILUTFunction": "LINEAR_EXACT"}), ((DEEP - 2000.0) / 1500 + 0.5).clip(0, 1)),
    "sigmoid": ((DEEP, None, {"BitsStored": 12, "WindowCenter": 2000, "WindowWidth": 900, "VOILUTFunction": "SIGMOID"}),
                1 / (1 + np.exp(-4 * (DEEP - 2000.0) / 900))),
    "rescale, the first of two windows": (
        ((HU + 1024).astype(np.uint16), None, {"BitsStored": 12, "RescaleSlope": 1, "RescaleIntercept": -1024,
                                     "WindowCenter": [40, 600], "WindowWidth": [400, 1500]}),
        window(HU.astype(float), 40, 400)),
    "signed": ((HU, None, {}), (HU + 32768.0) / 65535),
    "MONOCHROME1": ((DEEP, "MONOCHROME1", {"BitsStored": 12}), 1 - DEEP / 4095),
    "MONOCHROME1, window": ((DEEP, "MONOCHROME1", {"BitsStored": 12, "WindowCenter": 2000, "WindowWidth": 1500}),
                            1 - window(DEEP.astype(float), 2000, 1500)),
    "VOI table": ((DEEP, None, {"BitsStored": 12, "VOILUTSequence": table(CURVE, 10)}), CURVE[DEEP] / 1023),
    "VOI table and window": ((DEEP, None, {"BitsStored": 12, "VOILUTSequence": table(CURVE, 10), "WindowCenter": 9,
                                           "WindowWidth": 9}), CURVE[DEEP] / 1023),
    "modality table": ((DEEP, None, {"BitsStored": 12, "ModalityLUTSequence": table(CURVE, 16)}), CURVE[DEEP] / 65535),
}  # fmt: skip


@pytest.mark.parametrize("case", PICTURES)
def test_grey_files_are_read_as_they_are_shown(case, tmp_path):
    (pixels, photometric, tags), expected = PICTURES[case]
    path = write_picture(tmp_path / "image.dcm", pixels, photometric, **tags)
    np.testing.assert_allclose(load(path)[0], expected, atol=1e-5)  # read as 16 bits
    # The range of a task that was trained on 16-bit files is filled as well.
    np.testing.assert_allclose(load(path, {"range": [0, 65535]})[0], expected, atol=1e-6)
    assert (describe_image(str(path)).spatial_dims, describe_image(str(path)).channels) == (2, 1)


def test_a_stated_range_is_one_of_values_after_the_rescale(tmp_path):
    tags = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 0, "WindowWidth": 10}
    path = write_picture(tmp_path / "ct", (HU + 1024).astype(np.uint16), **tags)
    np.testing.assert_allclose(load(path, {"range": [-160, 240]})[0], ((HU + 160.0) / 400).clip(0, 1), atol=1e-6)
    path = write_picture(tmp_path / "cr", DEEP, "MONOCHROME1", BitsStored=12)
    np.testing.assert_allclose(load(path, {"range": [0, 4095]})[0], 1 - DEEP / 4095, atol=1e-6)
    low, high = np.percentile(DEEP, (0.5, 99.5))
    shown = ((high - DEEP) / (high - low)).clip(0, 1)
    np.testing.assert_allclose(load(path, {"percentiles": [0.5, 99.5]})[0], shown, atol=2e-3)


def test_colours_equal_the_png(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    expected = load(tmp_path / "a.png", channels=3)
    rgb = write_picture(tmp_path / "rgb", COLOURS)
    np.testing.assert_array_equal(load(rgb, channels=3), expected)
    np.testing.assert_array_equal(load(rgb), load(tmp_path / "a.png"))
    Image.fromarray(GREY).save(tmp_path / "grey.png")
    np.testing.assert_allclose(load(write_picture(tmp_path / "grey", GREY)), load(tmp_path / "grey.png"), atol=1e-6)
    ybr = convert_color_space(COLOURS, "RGB", "YBR_FULL")
    path = write_picture(tmp_path / "ybr", ybr, "YBR_FULL")
    np.testing.assert_allclose(load(path, channels=3), expected, atol=1.5 / 255)  # YBR is rounded
    shades = np.array([[0, 255, 20], [0, 10, 255], [100, 0, 0]])
    colours = {}
    for name, own in zip(("Red", "Green", "Blue"), shades * 257, strict=True):
        colours[f"{name}PaletteColorLookupTableDescriptor"] = [3, 0, 16]
        colours[f"{name}PaletteColorLookupTableData"] = own.astype(np.uint16).tobytes()
    path = write_picture(tmp_path / "palette", GREY % 3, "PALETTE COLOR", **colours)
    np.testing.assert_allclose(load(path, channels=3), shades[:, GREY % 3] / 255, atol=1e-6)
    assert [describe_image(str(p)).channels for p in (rgb, path)] == [3, 3]


def test_a_compressed_file_equals_the_plain_one(tmp_path):
    for pixels, channels in ((DEEP, 1), (COLOURS, 3)):
        path = write_picture(tmp_path / "image.dcm", pixels)
        expected = load(path, channels=channels)
        data = pydicom.dcmread(path)
        data.compress(pydicom.uid.RLELossless)
        data.save_as(path)
        np.testing.assert_array_equal(load(path, channels=channels), expected)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-60])


def _lossless_jpeg(path):
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLosslessSV1
    data.PixelData = pydicom.encaps.encapsulate([b"\0" * 100])
    data["PixelData"].is_undefined_length = True
    data.save_as(path)


def _report(path):
    data = pydicom.dcmread(path)
    del data.PixelData
    data.save_as(path)


SPOILT = {
    "frames": (
        lambda path: write_picture(path, np.stack([GREY] * 4), NumberOfFrames=4),
        "several frames, expected one",
    ),
    "no pixels": (_report, "holds no image"),
    "no DICOM": (lambda path: path.write_bytes(bytes(128) + b"DICM no image at all"), "holds no image"),
    "cut": (_cut, "less than expected"),
    "compressed": (_lossless_jpeg, "nothing installed here can decode"),
    "CMYK": (lambda path: write_picture(path, COLOURS, "CMYK"), "is not grey, RGB"),
    "deep colours": (lambda path: write_picture(path, COLOURS.astype(np.uint16)), "is not grey, RGB"),
}


@pytest.mark.parametrize("name", ["image.dcm", "image"])
@pytest.mark.parametrize("case", SPOILT)
def test_what_is_no_single_picture_is_refused_by_name(case, name, tmp_path):
    spoil, words = SPOILT[case]
    path = write_picture(tmp_path / name, GREY)
    spoil(path)
    configs = preprocessing(TaskSpec("task", 0, {0: "a", 1: "b"}), "classification", 2, 1, 16)
    with pytest.raises(LoRKDError, match=f"{name}.*{words}"):
        ItemLoader(configs, 2)({"image": str(path)})


def test_dicom_is_told_by_name_or_content(tmp_path):
    for name in ("a.dcm", "b.DCM", "c.ima", "d", "1.2.840.113619", "e.img"):
        assert is_dicom(write_picture(tmp_path / "series" / name, GREY)), name
    assert is_series(tmp_path / "series")
    (tmp_path / "others").mkdir()
    for name in ("a.png", "b", "c.nii.gz", "empty"):
        (tmp_path / "others" / name).write_bytes(b"" if name == "empty" else bytes(200))
        assert not is_dicom(tmp_path / "others" / name)
    write_picture(tmp_path / "others" / "DICOMDIR", GREY)  # a table of contents has the same letters
    assert not is_dicom(tmp_path / "others" / "DICOMDIR") and not is_series(tmp_path / "others")
    assert not is_dicom(tmp_path / "series") and not is_series(tmp_path / "nowhere")
