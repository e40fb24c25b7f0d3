"""The stock preprocessing and postprocessing: what they give, and that files come back in their own geometry."""

from __future__ import annotations

import csv
import json

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset
from PIL import Image

from lorkd_monai.data import TaskSpec
from lorkd_monai.errors import LoRKDError
from lorkd_monai.transforms import (
    CT_WINDOW,
    ItemLoader,
    default_intensity,
    postprocessing,
    preprocessing,
    saving_handlers,
)


def make_task(**more):
    return TaskSpec("task", 0, {0: "background", 1: "one", 2: "two"}, **more)


class Threshold(torch.nn.Module):
    """Three classes by the first channel's grey value, so that the right mask is known."""

    def forward(self, x):
        x = x[:, :1]
        return torch.cat([0.3 - x, 0.25 - (x - 0.55).abs(), x - 0.8], dim=1)


def infer(tmp_path, task, kind, dims, image, network, in_channels=3, image_size=32):
    """Run the configs as an expert bundle's inference.json does, with MONAI alone."""
    config = {
        "output_dir": str(tmp_path / "out"),
        "preprocessing": {
            "_target_": "Compose",
            "transforms": preprocessing(task, kind, dims, in_channels, image_size),
        },
        "postprocessing": {"_target_": "Compose", "transforms": postprocessing(task, kind, dims)},
        "handlers": saving_handlers(kind),
    }
    parser = ConfigParser(json.loads(json.dumps(config)))
    dataset = Dataset([{"image": str(image)}], transform=parser.get_parsed_content("preprocessing"))
    from monai.engines import SupervisedEvaluator
    from monai.inferers import SimpleInferer, SlidingWindowInferer

    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(dataset, batch_size=1),
        network=network,
        inferer=SlidingWindowInferer(image_size, overlap=0.25)
        if dims == 3 and kind == "segmentation"
        else SimpleInferer(),
        postprocessing=parser.get_parsed_content("postprocessing"),
        val_handlers=parser.get_parsed_content("handlers"),
    )
    evaluator.run()
    return evaluator.state.output[0]["pred"]


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
@pytest.mark.parametrize("dims", [2, 3])
def test_configs_are_json_of_stock_monai(kind, dims):
    task = make_task(spacing=(1.0, 1.0, 2.0), modality="CT", note="$__import__('os')")
    keys = ("image", "label") if kind == "segmentation" else ("image",)
    configs = preprocessing(task, kind, dims, 3, 32, keys) + postprocessing(task, kind, dims)
    text = json.dumps(configs)
    assert "lorkd" not in text and "__import__" not in text
    parser = ConfigParser(
        {"output_dir": "out", "preprocessing": {"_target_": "Compose", "transforms": []}, "all": configs}
    )
    parser.get_parsed_content("all")


def test_grey_is_repeated_and_scaled(tmp_path):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(pixels).save(tmp_path / "a.png")
    load = ItemLoader(preprocessing(make_task(), "classification", 2, 3, 8), 2)
    image = load({"image": str(tmp_path / "a.png")})["image"]
    assert image.shape == (3, 8, 8)
    for channel in image:  # rows stay rows
        np.testing.assert_allclose(channel, pixels / 255, atol=1e-7)


def test_colours_become_grey_as_pil_does(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    load = ItemLoader(preprocessing(make_task(), "classification", 2, 1, 8), 2)
    image = load({"image": str(tmp_path / "a.png")})["image"]
    expected = np.asarray(Image.fromarray(pixels).convert("L"), dtype=np.float64) / 255
    np.testing.assert_allclose(image[0], expected, atol=0.6 / 255)


def test_default_intensity():
    assert default_intensity(make_task(modality="CT"), 2) == {"range": [0.0, 255.0]}
    assert default_intensity(make_task(modality="ct "), 3) == {"range": list(CT_WINDOW)}
    assert default_intensity(make_task(modality="MR"), 3) == {"percentiles": [0.5, 99.5]}
    assert default_intensity(make_task(intensity={"range": [0, 80]}, modality="CT"), 3) == {"range": [0, 80]}


def test_ct_window_and_percentiles_act_on_values(tmp_path):
    volume = np.linspace(-1000, 1000, 8**3, dtype=np.float32).reshape(8, 8, 8)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "a.nii.gz")
    for task, low, high in (
        (make_task(modality="CT"), *CT_WINDOW),
        (make_task(modality="CT", intensity={"range": [-50, 50]}), -50, 50),
        (make_task(modality="MR"), *np.percentile(volume, [0.5, 99.5])),
    ):
        load = ItemLoader(preprocessing(task, "segmentation", 3, 1, 8), 3)
        image = load({"image": str(tmp_path / "a.nii.gz")})["image"]
        np.testing.assert_allclose(image[0], np.clip((volume - low) / (high - low), 0, 1), atol=1e-4)


@pytest.mark.parametrize("shape", [(20, 45), (45, 20), (64, 32)])
def test_2d_mask_comes_back_with_the_rows_and_columns_of_the_image(tmp_path, shape):
    truth = np.zeros(shape, dtype=np.uint8)
    truth[2:9, 3:15], truth[10:18, 5:19] = 1, 2
    Image.fromarray(np.choose(truth, [0, 140, 255]).astype(np.uint8)).save(tmp_path / "a.png")
    pred = infer(tmp_path, make_task(), "segmentation", 2, tmp_path / "a.png", Threshold(), image_size=64)
    written = np.asarray(Image.open(tmp_path / "out" / "a_seg.png"))
    assert written.shape == shape and written.dtype == np.uint8 and pred.dtype == torch.uint8
    assert tuple(pred.shape) == (1, *shape)
    assert (written == truth).mean() > 0.9


def rotated(angle, spacing):
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, np.cos(0.2), -np.sin(0.2)], [0, np.sin(0.2), np.cos(0.2)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ tilt @ np.diag(spacing)
    affine[:3, 3] = (11, -7, 30)
    return affine


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (-0.8, 0.9, 3.0)])
def test_3d_mask_comes_back_in_the_geometry_of_an_oblique_file(tmp_path, spacing):
    truth = np.zeros((30, 26, 14), dtype=np.uint8)
    truth[4:16, 5:14, 3:9], truth[18:27, 14:23, 5:11] = 1, 2
    volume = np.choose(truth, [0, 140, 255]).astype(np.int16)
    affine = rotated(0.4, spacing)
    nibabel.save(nibabel.Nifti1Image(volume, affine), tmp_path / "a.nii.gz")
    task = make_task(spacing=(1.2, 1.0, 1.5), intensity={"range": [0, 255]})
    infer(tmp_path, task, "segmentation", 3, tmp_path / "a.nii.gz", Threshold(), in_channels=1)
    written = nibabel.load(tmp_path / "out" / "a_seg.nii.gz")
    assert written.shape == volume.shape and written.get_data_dtype() == np.uint8
    np.testing.assert_allclose(written.affine, affine, atol=1e-5)
    assert (np.asarray(written.dataobj) == truth).mean() > 0.95


def test_masks_are_resampled_with_their_image(tmp_path):
    truth = np.zeros((20, 20, 10), dtype=np.uint8)
    truth[5:15, 5:15, 2:8] = 1
    for name, array in (("image", truth * 200), ("label", truth)):
        nibabel.save(nibabel.Nifti1Image(array, rotated(0.3, (1, 1, 2))), tmp_path / f"{name}.nii.gz")
    task = make_task(spacing=(1.0, 1.0, 1.0), intensity={"range": [0, 200]})
    load = ItemLoader(preprocessing(task, "segmentation", 3, 1, 32, ("image", "label")), 3)
    out = load({key: str(tmp_path / f"{key}.nii.gz") for key in ("image", "label")})
    assert out["image"].shape == out["label"].shape and set(out["label"].unique().tolist()) == {0, 1}
    assert ((out["image"] > 0.5) == (out["label"] > 0.5)).float().mean() > 0.97


@pytest.mark.parametrize("dims", [2, 3])
def test_classification_saves_probabilities(tmp_path, dims):
    if dims == 2:
        image = tmp_path / "a.png"
        Image.fromarray(np.full((10, 12), 128, dtype=np.uint8)).save(image)
    else:
        image = tmp_path / "a.nii.gz"
        nibabel.save(nibabel.Nifti1Image(np.full((9, 8, 7), 128, dtype=np.uint8), np.eye(4)), image)

    class Mean(torch.nn.Module):
        def forward(self, x):
            return torch.stack([x.flatten(1).mean(1), torch.zeros(len(x)), torch.ones(len(x))], dim=1)

    task = make_task(intensity={"range": [0, 255]})
    pred = infer(tmp_path, task, "classification", dims, image, Mean(), in_channels=1, image_size=16)
    expected = torch.softmax(torch.tensor([128 / 255, 0, 1]), 0)
    torch.testing.assert_close(torch.as_tensor(pred), expected, atol=1e-5, rtol=0)
    (row,) = csv.reader((tmp_path / "out" / "predictions.csv").open())
    assert row[0] == str(image) and np.allclose(list(map(float, row[1:])), expected, atol=1e-5)


def test_wrong_arguments_are_refused():
    task = make_task()
    with pytest.raises(LoRKDError, match="expected kind .* got 'detection' and 2"):
        preprocessing(task, "detection", 2, 1, 32)
    with pytest.raises(LoRKDError, match="spatial_dims 2 or 3, got .* and 4"):
        postprocessing(task, "segmentation", 4)
    with pytest.raises(LoRKDError, match="expected keys"):
        preprocessing(task, "classification", 2, 1, 32, ("image", "label"))
    with pytest.raises(LoRKDError, match="in_channels must be"):
        preprocessing(task, "classification", 2, 0, 32)
    with pytest.raises(LoRKDError, match="image_size must be"):
        preprocessing(task, "classification", 2, 1, [32, 32, 32])
    with pytest.raises(LoRKDError, match="resizes to a square"):
        preprocessing(task, "segmentation", 2, 1, [32, 48])
    with pytest.raises(LoRKDError, match="intensity must be"):
        preprocessing(make_task(intensity={"range": [5, 5]}), "classification", 2, 1, 32)
    many = TaskSpec("many", 0, {i: str(i) for i in range(300)})
    with pytest.raises(LoRKDError, match="300 classes"):
        postprocessing(many, "segmentation", 2)
