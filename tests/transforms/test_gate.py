"""What an image and a mask must be: each fault is refused in words that name the file, and what is right stays."""

from __future__ import annotations

import json
import warnings

import nibabel
import numpy as np
import pytest
from monai.bundle import ConfigParser
from PIL import Image

from lorkd_monai.data import TaskDataset, TaskSpec, load_data_list
from lorkd_monai.errors import LoRKDError
from lorkd_monai.transforms import ItemLoader, describe_image, preprocessing
from lorkd_monai.transforms.gate import refusal

RNG = np.random.default_rng(0)
GREY = RNG.random((16, 12))
EIGHT, SIXTEEN = (GREY * 255).astype(np.uint8), (GREY * 65535).astype(np.uint16)
MASK = (GREY > 0.5).astype(np.uint8)
VOLUME = (RNG.random((10, 11, 12)) * 100).astype(np.float32)
VOLUME_MASK = (VOLUME > 50).astype(np.uint8)
LABELS = {"0": "a", "1": "b"}


def make_task(**more):
    return TaskSpec("task", 0, {0: "a", 1: "b"}, **more)


def save(path, array, affine=None, **options):
    """Save an array as the kind of file that its name says; return the path as text."""
    if path.name.endswith((".nii", ".nii.gz")):
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    else:
        Image.fromarray(array).save(path, **options)
    return str(path)


def read(dims, item, task=None, in_channels=1, kind="segmentation"):
    keys = ("image", "label") if "label" in item else ("image",)
    return ItemLoader(preprocessing(task or make_task(), kind, dims, in_channels, 16, keys), dims)(item)


def make_list(folder, images, **entry):
    """A classification list of 2D files, or of an npz file where ``images`` is an array."""
    tasks, items = {"task": {"labels": LABELS, **entry}}, []
    if isinstance(images, np.ndarray):
        np.savez(folder / "a.npz", train_images=images, train_labels=np.arange(len(images)) % 2)
        tasks["task"]["npz"] = "a.npz"
    else:
        items = [{"image": name, "label": i % 2, "task": "task"} for i, name in enumerate(images)]
    (folder / "dataset.json").write_text(json.dumps({"tasks": tasks, "training": items}))
    return load_data_list(folder, "classification", 2)


def seen(data, in_channels=1):
    """What the network sees of each training image."""
    return [item["image"] for item in TaskDataset(data, "training", in_channels, 16, progress=False)]


@pytest.mark.parametrize("bits", [(8, 16), (16, 8)])
def test_each_2d_file_has_its_own_depth(tmp_path, bits):
    for number, depth in enumerate(bits):
        save(tmp_path / f"{number}.png", EIGHT if depth == 8 else SIXTEEN)
    images = seen(make_list(tmp_path, ["0.png", "1.png"]))
    assert abs(images[0] - images[1]).max() < 0.005 and images[0].max() > 0.9


def test_a_stated_range_counts_for_all_files(tmp_path):
    save(tmp_path / "0.png", (GREY * 200).astype(np.uint16))
    save(tmp_path / "1.png", (GREY * 200).astype(np.uint8))
    images = seen(make_list(tmp_path, ["0.png", "1.png"], intensity={"range": [0, 200]}))
    assert (images[0] == images[1]).all() and images[0].max() > 0.9


@pytest.mark.parametrize(
    ("array", "intensity"),
    [
        (GREY.astype(np.float32), {"range": [0, 1]}),
        ((GREY * 1.05 - 0.02).astype(np.float32), {"range": [0, 1]}),
        ((GREY * 255).astype(np.float32), None),
        ((GREY * 8 - 4).astype(np.float32), {"percentiles": [0.5, 99.5]}),
        ((GREY * 2000 - 1000).astype(np.int16), {"percentiles": [0.5, 99.5]}),
        ((GREY * 255).astype(np.int32), None),
        ((GREY * 65535).astype(np.int32), {"range": [0, 65535]}),
    ],
)
@pytest.mark.parametrize("as_file", [False, True])
def test_floats_and_signed_numbers_are_seen_in_full(tmp_path, array, intensity, as_file):
    if as_file:
        save(tmp_path / "0.tif", array)
    data = make_list(tmp_path, ["0.tif"] if as_file else np.stack([array, array]))
    assert data.tasks["task"].intensity == intensity
    image = seen(data)[0]
    assert image.min() < 0.05 and image.max() > 0.95


def test_signed_ct_has_the_window_of_ct(tmp_path):
    save(tmp_path / "0.tif", (GREY * 2000 - 1000).astype(np.int16))
    data = make_list(tmp_path, ["0.tif"], modality="CT")
    expected = np.clip(((GREY * 2000 - 1000).astype(np.int16) + 160) / 400, 0, 1)
    image = read(2, {"image": str(tmp_path / "0.tif")}, data.tasks["task"])["image"]
    np.testing.assert_allclose(image[0, :, 2:14], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (EIGHT, GREY.astype(np.float32), "white is 255"),
        (EIGHT, (GREY * 2000 - 1000).astype(np.int16), "white is 255"),
        (EIGHT, (GREY * 8 - 4).astype(np.float32), "white is 255"),
        (SIXTEEN, (GREY * 255).astype(np.float32), "white is 65535"),
        (SIXTEEN, (GREY * 2000 - 1000).astype(np.int16), "white is 65535"),
    ],
)
def test_numbers_that_can_be_two_things_are_refused(tmp_path, first, second, words):
    save(tmp_path / "0.tif", first)
    save(tmp_path / "1.tif", second)
    data = make_list(tmp_path, ["0.tif", "1.tif"])
    with pytest.raises(LoRKDError, match=rf"1\.tif holds values from .* {words}.*state the intensity"):
        TaskDataset(data, "training", 1, 16, progress=False)


@pytest.mark.parametrize("suffix", ["tif", "gif", "png", "webp"])
def test_several_pictures_in_one_file_are_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    first, second = (Image.fromarray(array).convert("RGB") for array in (EIGHT, 255 - EIGHT))
    first.save(path, save_all=True, append_images=[second])
    with pytest.raises(LoRKDError, match=rf"a\.{suffix} holds 2 pages or frames, expected one"):
        read(2, {"image": str(path)})
    first.save(path)
    assert read(2, {"image": str(path)})["image"].max() > 0.9


@pytest.mark.parametrize("tag", range(1, 9))
def test_image_and_mask_turn_together(tmp_path, tag):
    exif = Image.Exif()
    exif[274] = tag
    image = save(tmp_path / "a.png", MASK * 255, exif=exif)
    turned = np.asarray(Image.open(image).convert("L")) if tag == 1 else None
    if tag > 1:
        from PIL import ImageOps

        turned = np.asarray(ImageOps.exif_transpose(Image.open(image)))
    for name, mask, options in (("plain", turned // 255, {}), ("tagged", MASK, {"exif": exif})):
        item = read(2, {"image": image, "label": save(tmp_path / f"{name}.png", mask, **options)})
        assert ((item["image"] > 0.5) == (item["label"] > 0.5)).float().mean() > 0.9
    if tag > 4:
        with pytest.raises(
            LoRKDError, match=r"a\.png with mask .*lying\.png: .*size \(12, 16\), its mask of \(16, 12\)"
        ):
            read(2, {"image": image, "label": save(tmp_path / "lying.png", MASK)})
        with pytest.raises(LoRKDError, match=r"a\.tif lies on its side"):
            read(2, {"image": save(tmp_path / "a.tif", EIGHT, exif=exif)})


@pytest.mark.parametrize(
    "mask", [MASK, np.stack([MASK] * 3, -1), np.stack([MASK] * 3 + [MASK * 0 + 255], -1), MASK.astype(np.float32)]
)
def test_masks_of_one_meaning_are_taken(tmp_path, mask):
    suffix = "tif" if mask.dtype == np.float32 else "png"
    item = {"image": save(tmp_path / "a.png", EIGHT), "label": save(tmp_path / f"m.{suffix}", mask)}
    got = read(2, item)["label"]
    assert got.shape == (1, 16, 16) and (got[0, :, 2:14].numpy() == MASK).all()


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.stack([1 - MASK, MASK, MASK * 0], -1), "the mask has 3 channels, expected one of class ids.*argmax"),
        (MASK * 255, "the mask holds 255, its task has classes 0 to 1 .*not grey values"),
        ((MASK * 0.5).astype(np.float32), r"the mask holds 0\.5, .*whole class ids"),
        (np.where(MASK, 1, np.nan).astype(np.float32), "the mask holds nan, .*whole class ids"),
        (MASK[:-1], r"size \(16, 12\), its mask of \(15, 12\)"),
    ],
)
def test_other_2d_masks_are_refused(tmp_path, mask, words):
    suffix = "tif" if mask.dtype == np.float32 else "png"
    item = {"image": save(tmp_path / "a.png", EIGHT), "label": save(tmp_path / f"m.{suffix}", mask)}
    with pytest.raises(LoRKDError, match=rf"m\.{suffix}: .*{words}"):
        read(2, item)


@pytest.mark.parametrize("mask", [VOLUME_MASK, VOLUME_MASK[..., None], (VOLUME_MASK * 0.9999999).astype(np.float32)])
def test_volume_masks_of_one_meaning_are_taken(tmp_path, mask):
    item = {"image": save(tmp_path / "a.nii.gz", VOLUME), "label": save(tmp_path / "m.nii.gz", mask)}
    assert (read(3, item)["label"][0].numpy() == VOLUME_MASK).all()


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.stack([1 - VOLUME_MASK, VOLUME_MASK], -1), "the mask has 2 channels"),
        (np.where(VOLUME_MASK, 1, np.nan).astype(np.float32), "the mask holds nan"),
        ((VOLUME_MASK * 0.99).astype(np.float32), r"the mask holds 0\.99, "),
        (VOLUME_MASK.astype(np.int16) - 1, "the mask holds -1, its task has classes 0 to 1"),
    ],
)
def test_other_volume_masks_are_refused(tmp_path, mask, words):
    item = {"image": save(tmp_path / "a.nii.gz", VOLUME), "label": save(tmp_path / "m.nii.gz", mask)}
    with pytest.raises(LoRKDError, match=rf"m\.nii\.gz: {words}"):
        read(3, item)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    volume, picture = VOLUME.copy(), GREY.astype(np.float32)
    volume[2, 3, 4] = picture[2, 3] = value
    for dims, path in ((3, save(tmp_path / "a.nii.gz", volume)), (2, save(tmp_path / "a.tif", picture))):
        with pytest.raises(LoRKDError, match=r"/a\..* holds values that are not finite"):
            read(dims, {"image": path}, make_task(intensity={"range": [0, 1]}))


def test_volumes_of_complex_numbers_or_colours_are_refused(tmp_path):
    colours = np.zeros(VOLUME.shape, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    for name, array in (("complex", VOLUME.astype(np.complex64)), ("colours", colours)):
        path = save(tmp_path / f"{name}.nii.gz", array)
        with pytest.raises(LoRKDError, match=rf"/{name}\.nii\.gz.*"):
            read(3, {"image": path})
    with pytest.raises(
        LoRKDError, match="complex.nii.gz holds complex numbers or colours, expected one number a voxel"
    ):
        read(3, {"image": str(tmp_path / "complex.nii.gz")})


@pytest.mark.parametrize(
    ("array", "channels", "words"),
    [
        (np.stack([VOLUME] * 4, -1), None, "has 4 channels, expected 1"),
        (VOLUME, 4, "has 1 channel, expected 4"),
        (VOLUME[..., 0], None, r"has the axes \(10, 11\), expected 3"),
        (np.stack([VOLUME] * 3, -1)[:, :, :, None], None, "has the axes"),
    ],
)
def test_volumes_of_other_channels_are_refused(tmp_path, array, channels, words):
    path = save(tmp_path / "a.nii.gz", array)
    with pytest.raises(LoRKDError, match=rf"a\.nii\.gz {words}"):
        read(3, {"image": path}, make_task(channels=channels), in_channels=channels or 1)


def test_a_fourth_channel_is_alpha_only_where_it_is_white_throughout(tmp_path):
    colours = RNG.integers(0, 255, (2, 8, 8, 4), dtype=np.uint8)
    data = make_list(tmp_path, colours)
    assert data.tasks["task"].channels == 4
    with pytest.raises(LoRKDError, match="images of 4 channels, the network takes 3"):
        seen(data, 3)
    assert all((image.numpy() > 0).any() for image in seen(data, 4)[0])
    colours[..., 3] = 255
    data = make_list(tmp_path, colours)
    assert data.tasks["task"].channels == 3 and seen(data, 3)[0].shape == (3, 16, 16)
    colours[0, 0, 0, 3] = 0
    assert seen(make_list(tmp_path, colours, channels=3), 3)[0].shape == (3, 16, 16)
    assert make_list(tmp_path, colours.astype(np.float32)[..., :2]).tasks["task"].channels == 2


@pytest.mark.parametrize(
    ("affine", "words"),
    [
        (np.diag([1, 1, 0, 1.0]), "spacing of 0 mm"),
        (np.diag([0, 0, 0, 1.0]), "spacing of 0 mm"),
        (np.diag([1, np.nan, 1, 1.0]), "holds NaN or infinity"),
        (np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "axes in one plane"),
    ],
)
def test_affines_that_are_none_are_refused(tmp_path, affine, words):
    image = nibabel.Nifti1Image(VOLUME, None)
    image.header.set_sform(affine, code=1)
    image.header.set_qform(None, code=0)
    path = str(tmp_path / "a.nii.gz")
    nibabel.save(image, path)
    with pytest.raises(LoRKDError, match=rf"a\.nii\.gz: its affine .*{words}.*fix its header"):
        read(3, {"image": path}, make_task(spacing=(1.0, 1.0, 1.0)))
    with pytest.raises(LoRKDError, match=rf"a\.nii\.gz: its affine .*{words}"):
        describe_image(path)


def sparse(**voxels):
    volume = np.zeros((16, 16, 16), np.float32)
    for name, value in voxels.items():
        volume[int(name[1:]), 1, 1] = value
    return volume


@pytest.mark.filterwarnings("ignore:Divide by zero")
@pytest.mark.parametrize(
    ("volume", "expected"),
    [
        (sparse(v1=900), sparse(v1=1)),
        (sparse(v1=0.2), sparse(v1=1)),
        (sparse(v1=900, v2=450), sparse(v1=1, v2=0.5)),
        (sparse(v1=-100, v2=300), np.full((16, 16, 16), 0.25, np.float32) + sparse(v1=-0.25, v2=0.75)),
        (sparse() + 7, sparse()),
    ],
)
def test_percentiles_that_coincide_scale_from_least_to_greatest(tmp_path, volume, expected):
    image = read(3, {"image": save(tmp_path / "a.nii.gz", volume)})["image"]
    np.testing.assert_allclose(image[0].numpy(), expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Divide by zero")
def test_only_the_channel_whose_percentiles_coincide_is_scaled_otherwise(tmp_path):
    both = np.stack([VOLUME, VOLUME * 0], -1)
    alone = read(3, {"image": save(tmp_path / "b.nii.gz", VOLUME)})["image"]
    image = read(3, {"image": save(tmp_path / "a.nii.gz", both)}, make_task(channels=2), in_channels=2)["image"]
    assert (image[0] == alone[0]).all() and (image[1] == 0).all()


@pytest.mark.parametrize(
    ("array", "options", "words"),
    [
        (EIGHT * 0, {}, "nearly all 0"),
        (EIGHT * 0 + 255, {}, "nearly all 1"),
        (EIGHT, {"intensity": {"range": [0, 65535]}}, "nearly all 0"),
        (SIXTEEN | 1024, {"intensity": {"range": [0, 255]}}, "nearly all 1"),
        (EIGHT, {"intensity": {"range": [-160, 240]}}, "holds no value below 0"),
    ],
)
def test_odd_images_are_named(tmp_path, array, options, words):
    for name in ("0.png", "1.png"):
        save(tmp_path / name, array)
    with pytest.warns(UserWarning, match=rf"look at .*0\.png: it .*{words}"):
        read(2, {"image": str(tmp_path / "0.png")}, make_task(**options))
    data = make_list(tmp_path, ["0.png", "1.png"], **options)
    for size in (16, 8):  # many together, and one by one
        with pytest.warns(UserWarning, match=rf"look at .*0\.png \(2 images of training\): it .*{words}"):
            TaskDataset(data, "training", 1, size, progress=False)


def test_usual_images_are_not_named(tmp_path):
    path = save(tmp_path / "a.png", EIGHT)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        read(2, {"image": path})


def test_a_refusal_is_found_behind_the_errors_of_monai_and_of_a_worker(tmp_path):
    from monai.data import DataLoader, Dataset

    path = save(tmp_path / "a.nii.gz", np.where(VOLUME_MASK, VOLUME, np.nan))
    configs = {"_target_": "Compose", "transforms": preprocessing(make_task(), "segmentation", 3, 1, 16)}
    transform = ConfigParser({"preprocessing": configs}).get_parsed_content("preprocessing")
    for workers in (0, 1):
        with pytest.raises(RuntimeError) as caught:
            list(DataLoader(Dataset([{"image": path}], transform), num_workers=workers))
        assert refusal(caught.value) == f"{path} holds values that are not finite (NaN or infinity); replace them"
    assert refusal(RuntimeError("another")) is None
