"""The teacher's intensities from the student's images, against MONAI's own transforms of the data's values."""

from __future__ import annotations

import pytest
import torch
from monai.bundle import ConfigParser

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks.teacher_intensity import find_intensity, given_intensity

RANGES = {"ct": (-100.0, 300.0), "grey": (0.0, 255.0)}


def step(name, **arguments):
    return {"_target_": name, "keys": "image", **arguments}


@pytest.mark.parametrize(
    "config",
    [
        step("ScaleIntensityRanged", a_min=-175, a_max=250, b_min=0.0, b_max=1.0, clip=True),
        step("monai.transforms.ScaleIntensityRanged", a_min=-500, a_max=500, b_min=-1.0, b_max=1.0),
        step("ScaleIntensityRanged", a_min=0, a_max=10),
        step("NormalizeIntensityd", subtrahend=40.0, divisor=120.0),
        step("NormalizeIntensityd"),
        step("NormalizeIntensityd", channel_wise=True),
        step("ScaleIntensityd"),
        step("ScaleIntensityd", minv=-1.0, maxv=2.0, channel_wise=True),
    ],
)
def test_equals_the_transform_of_the_values(config):
    x = torch.rand(2, 2, 6, 6, dtype=torch.float64)
    found = find_intensity([step("LoadImaged"), config, step("CropForegroundd")], RANGES)
    given = found(x, [0, 1])
    transform = ConfigParser(config).get_parsed_content()
    for row, (low, high) in enumerate(RANGES.values()):
        values = x[row] * (high - low) + low
        expected = torch.as_tensor(transform({"image": values})["image"], dtype=torch.float64)
        torch.testing.assert_close(given[row], expected, rtol=1e-5, atol=1e-5)


def test_statistics_of_non_zero_voxels():
    x = torch.rand(1, 1, 8, 8)
    x[..., :4] = 0
    config = step("NormalizeIntensityd", nonzero=True)
    given = find_intensity([config], {"grey": (0.0, 255.0)})(x, [0])
    expected = ConfigParser(config).get_parsed_content()({"image": x[0] * 255})["image"]
    torch.testing.assert_close(given[0], torch.as_tensor(expected), rtol=1e-4, atol=1e-4)
    with pytest.raises(LoRKDError, match="non-zero voxels, while the student's 0 is not the data's"):
        find_intensity([config], RANGES)


def test_nothing_to_do():
    steps = [step("LoadImaged"), step("ScaleIntensityd", keys="other"), step("ScaleIntensityd", _disabled_=True)]
    assert find_intensity(steps, RANGES) is None
    assert given_intensity("same", RANGES) is None
    flat = find_intensity([step("NormalizeIntensityd")], RANGES)(torch.ones(1, 1, 4, 4), [0])
    assert torch.equal(flat, torch.zeros(1, 1, 4, 4))


def test_given():
    x = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    given = given_intensity({"range": [-100, 100], "to": [-1, 1]}, RANGES)(x, [0, 1])
    torch.testing.assert_close(given.flatten(), torch.tensor([-1.0, 2.55]))


@pytest.mark.parametrize(
    ("steps", "ranges", "message"),
    [
        ([step("HistogramNormalized")], RANGES, "HistogramNormalize, which can't be followed"),
        ([step("ScaleIntensityd"), step("NormalizeIntensityd")], RANGES, "NormalizeIntensity after another step"),
        ([step("ScaleIntensityRanged", a_min=0, a_max=1)], {"mr": None}, "images of mr are scaled by their own perc"),
        ([step("ScaleIntensityRanged", a_min=2, a_max=2)], RANGES, "range of intensities is empty"),
        ([step("ScaleIntensityRanged", a_min="$x", a_max=2)], RANGES, "values that are no numbers"),
        ([step("NormalizeIntensityd", subtrahend=[1, 2], divisor=[1, 2])], RANGES, "subtrahend or divisor for each"),
        ([step("ScaleIntensityd", minv=None, maxv=None, factor=0.5)], RANGES, "by a factor"),
    ],
)
def test_refused(steps, ranges, message):
    with pytest.raises(LoRKDError, match=message):
        find_intensity(steps, ranges)


@pytest.mark.parametrize("intensity", ["other", {"to": [0, 1]}, {"range": [0]}, {"range": [0, 1], "by": 2}, 3])
def test_given_refused(intensity):
    with pytest.raises(LoRKDError, match="intensity must be 'auto', 'same', 'zscore'"):
        given_intensity(intensity, RANGES)
