"""The multi-task data set: the same values as the stock transforms give, caches, patches, and clear refusals."""

from __future__ import annotations

import json
import time

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lorkd_monai.data import TaskDataset, TaskSampler, load_data_list, make_phantoms
from lorkd_monai.data.samplers import Draw
from lorkd_monai.errors import LoRKDError
from lorkd_monai.transforms import ItemLoader, preprocessing


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """One data list of phantoms for each kind, as {(kind, dims): DataList}."""
    lists = {}
    for kind in ("classification", "segmentation"):
        for dims in (2, 3):
            folder = tmp_path_factory.mktemp(f"{kind}_{dims}")
            make_phantoms(folder, kind, dims, num_images=10, image_size=20)
            lists[kind, dims] = load_data_list(folder, kind, dims)
    return lists


@pytest.mark.parametrize("image_size", [16, 24])
@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize(("kind", "dims"), [("classification", 2), ("classification", 3), ("segmentation", 2)])
def test_equals_the_stock_chain(phantoms, kind, dims, in_channels, image_size):
    data = phantoms[kind, dims]
    dataset = TaskDataset(data, "training", in_channels, image_size)
    keys = ("image", "label") if kind == "segmentation" else ("image",)
    for item, row, number in zip(dataset, data.training, dataset.task_of_item, strict=True):
        task = data.tasks[row["task"]]
        stock = ItemLoader(preprocessing(task, kind, dims, in_channels, image_size, keys), dims)(row)
        assert item["image"].shape == (in_channels, *[image_size] * dims)
        torch.testing.assert_close(item["image"], stock["image"].as_tensor(), rtol=0, atol=1e-6)
        assert item["task"] == number == task.index
        expected = torch.tensor(row["label"]) if kind == "classification" else stock["label"].as_tensor().long()
        assert torch.equal(item["label"], expected)


def test_shared_arrays_equal_the_stock_chain(shared):
    data = load_data_list(shared / "data" / "2d_classification", "classification", 2)
    start = time.process_time()
    dataset = TaskDataset(data, "training", 3, 64)
    assert time.process_time() - start < 20  # about 2 s on one core
    for index in range(0, len(dataset), 401):
        row = data.training[index]
        task = data.tasks[row["task"]]
        stock = ItemLoader(preprocessing(task, "classification", 2, 3, 64), 2)(row)["image"]
        torch.testing.assert_close(dataset[index]["image"], stock.as_tensor(), rtol=0, atol=1e-6)


def test_an_array_and_its_png_train_alike(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 28, 28, 3), dtype=np.uint8)
    labels = np.arange(6) % 2
    np.savez(tmp_path / "a.npz", train_images=pixels, train_labels=labels)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    names = {"0": "a", "1": "b"}
    content = {
        "tasks": {"arrays": {"labels": names, "npz": "a.npz"}, "files": {"labels": names}},
        "training": [{"image": f"{i}.png", "label": int(labels[i]), "task": "files"} for i in range(6)],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    data = load_data_list(tmp_path, "classification", 2)
    for size in (20, 28, 40):
        dataset = TaskDataset(data, "training", 3, size)
        for i in range(6):
            torch.testing.assert_close(dataset[i]["image"], dataset[i + 6]["image"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "dims"), [(k, d) for k in ("classification", "segmentation") for d in (2, 3)])
def test_items_are_plain_and_collate(phantoms, kind, dims):
    data = phantoms[kind, dims]
    patch = 16 if (kind, dims) == ("segmentation", 3) else None
    dataset = TaskDataset(data, "training", 1, 16, patch_size=patch)
    sampler = TaskSampler(dataset.task_of_item, "balanced")
    batch = next(iter(DataLoader(dataset, batch_size=4, sampler=sampler)))
    assert all(type(value) is torch.Tensor for value in batch.values())
    assert batch["image"].shape == (4, 1, *[16] * dims) and batch["image"].dtype == torch.float32
    assert batch["label"].dtype == torch.int64 and batch["task"].shape == (4,)
    assert batch["label"].shape == ((4,) if kind == "classification" else (4, 1, *[16] * dims))
    assert batch["image"].min() >= 0 and batch["image"].max() <= 1
    if kind == "segmentation":
        assert batch["spacing"].shape == (4, dims)


def test_patches_depend_on_the_draw_alone_and_hold_foreground(phantoms):
    data = phantoms["segmentation", 3]
    dataset = TaskDataset(data, "training", 1, 12, patch_size=12)
    draws = list(TaskSampler(dataset.task_of_item, num_samples=60))
    items = [dataset[draw] for draw in draws]
    again = dataset[draws[7]]
    assert torch.equal(items[7]["image"], again["image"]) and torch.equal(items[7]["label"], again["label"])
    assert len({item["image"].sum().item() for item in items}) > 40
    assert sum((item["label"] > 0).any().item() for item in items) > 30
    whole = TaskDataset(data, "training", 1, 12)
    assert whole[0]["image"].shape[1] > 12


def test_small_volumes_are_padded_to_the_patch(phantoms):
    dataset = TaskDataset(phantoms["segmentation", 3], "training", 1, 40, patch_size=[40, 24, 32])
    assert dataset[0]["image"].shape == dataset[0]["label"].shape == (1, 40, 24, 32)


@pytest.mark.parametrize(("kind", "dims"), [("classification", 2), ("segmentation", 3)])
def test_bounded_memory_gives_the_same_items(phantoms, tmp_path, kind, dims):
    data = phantoms[kind, dims]
    full = TaskDataset(data, "training", 1, 16)
    none = TaskDataset(data, "training", 1, 16, cache_bytes=0)
    disk = TaskDataset(data, "training", 1, 16, cache_bytes=0, cache_dir=tmp_path / "cache")
    assert len(full._cache) == len(full) and not none._cache and not disk._cache
    for index in range(0, len(full), 3):
        for other in (none, disk, disk):
            assert torch.allclose(full[index]["image"], other[index]["image"], atol=1e-6)
            assert torch.equal(full[index]["label"], other[index]["label"])
    assert len(list((tmp_path / "cache").iterdir())) >= len(range(0, len(full), 3))


def test_a_changed_file_is_read_again_from_disk_cache(tmp_path):
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(tmp_path / "a.png")
    content = {
        "tasks": {"one": {"labels": {"0": "a", "1": "b"}}},
        "training": [{"image": "a.png", "label": 0, "task": "one"}],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    data = load_data_list(tmp_path, "classification", 2)
    assert TaskDataset(data, "training", 1, 8, cache_dir=tmp_path / "cache")[0]["image"].max() == 0
    Image.fromarray(np.full((8, 8), 255, dtype=np.uint8)).save(tmp_path / "a.png", compress_level=0)
    assert TaskDataset(data, "training", 1, 8, cache_dir=tmp_path / "cache")[0]["image"].max() == 1


def write_pair(folder, image, mask):
    nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), folder / "image.nii.gz")
    nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), folder / "mask.nii.gz")
    content = {
        "tasks": {"one": {"labels": {"0": "background", "1": "organ"}}},
        "training": [{"image": "image.nii.gz", "label": "mask.nii.gz", "task": "one"}],
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return load_data_list(folder, "segmentation", 3)


def test_bad_masks_and_images_are_named(tmp_path):
    volume, mask = np.random.default_rng(0).random((8, 8, 8), dtype=np.float32), np.zeros((8, 8, 8), dtype=np.uint8)
    mask[2, 3, 4] = 7
    with pytest.raises(LoRKDError, match=r"mask\.nii\.gz: the mask holds 7, its task has classes 0 to 1"):
        TaskDataset(write_pair(tmp_path, volume, mask), "training", 1, 8)
    volume[1, 1, 1] = np.nan
    with pytest.raises(LoRKDError, match=r"image\.nii\.gz holds values that are not finite"):
        TaskDataset(write_pair(tmp_path, volume, mask * 0), "training", 1, 8)


def test_a_file_that_breaks_later_is_named(tmp_path):
    volume = np.random.default_rng(0).random((8, 8, 8), dtype=np.float32)
    data = write_pair(tmp_path, volume, np.zeros((8, 8, 8), dtype=np.uint8))
    (tmp_path / "image.nii.gz").write_bytes((tmp_path / "image.nii.gz").read_bytes()[:200])
    with pytest.raises(LoRKDError, match=r"cannot read .*image\.nii\.gz"):
        TaskDataset(data, "training", 1, 8)


def test_volumes_without_foreground_give_patches(tmp_path):
    volume = np.random.default_rng(0).random((8, 8, 8), dtype=np.float32)
    data = write_pair(tmp_path, volume, np.zeros((8, 8, 8), dtype=np.uint8))
    assert TaskDataset(data, "training", 1, 6, patch_size=6)[0]["image"].shape == (1, 6, 6, 6)


@pytest.mark.parametrize("image_size", [6, 12])  # smaller and larger than the volumes
@pytest.mark.parametrize("on_disk", [False, True])
def test_volumes_without_labels_give_unlabelled_patches(tmp_path, image_size, on_disk, recwarn):
    volume = np.random.default_rng(0).random((9, 8, 8), dtype=np.float32)
    write_pair(tmp_path, volume, np.eye(9, 8, dtype=np.uint8)[..., None].repeat(8, 2))
    content = json.loads((tmp_path / "dataset.json").read_text())
    nibabel.save(nibabel.Nifti1Image(volume[::-1].copy(), np.eye(4)), tmp_path / "more.nii.gz")
    content["training"].append({**content["training"][0], "image": "more.nii.gz", "label": None})
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    data = load_data_list(tmp_path, "segmentation", 3)
    cache = {"cache_bytes": 0, "cache_dir": tmp_path / "cache"} if on_disk else {}
    dataset = TaskDataset(data, "training", 1, image_size, patch_size=image_size, **cache)
    assert dataset.task_of_item == [0, 0] and dataset.task_of_labelled == [0, -1]
    batch = next(iter(DataLoader(dataset, 2)))
    assert batch["image"].shape == (2, 1, *[image_size] * 3) and batch["label"].dtype == torch.int64
    assert batch["label"][0].min() == 0 and (batch["label"][1] == -1).all()
    patches = {tuple(dataset[Draw(1, seed)]["image"].flatten()[:4].tolist()) for seed in range(8)}
    assert len(patches) > 1 or image_size == 12
    assert not [w for w in recwarn if "class balanced" in str(w.message)]


def test_pictures_without_labels(tmp_path):
    for number in range(3):
        Image.fromarray(np.full((8, 6), 40 * number, dtype=np.uint8)).save(tmp_path / f"{number}.png")
    arrays = {"train_images": np.zeros((3, 8, 8), np.uint8), "train_labels": np.array([1, -1, 0])}
    np.savez(tmp_path / "a.npz", **arrays)
    labels = {"labels": {"0": "a", "1": "b"}}
    rows = [{"image": f"{n}.png", "label": label, "task": "one"} for n, label in enumerate((1, None, -1))]
    content = {"tasks": {"one": labels, "two": {**labels, "npz": "a.npz"}}, "training": rows}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    for size in (4, 8):
        dataset = TaskDataset(load_data_list(tmp_path, "classification", 2), "training", 1, size)
        assert [int(item["label"]) for item in dataset] == [1, -1, -1, 1, -1, 0]
        assert dataset.task_of_labelled == [0, -1, -1, 1, -1, 1]


def test_slices_without_masks_are_padded_without_labels(tmp_path):
    Image.fromarray(np.full((8, 4), 100, dtype=np.uint8)).save(tmp_path / "0.png")
    Image.fromarray(np.ones((8, 4), dtype=np.uint8)).save(tmp_path / "m.png")
    Image.fromarray(np.full((8, 4), 90, dtype=np.uint8)).save(tmp_path / "1.png")
    rows = [{"image": f"{n}.png", "label": label, "task": "one"} for n, label in enumerate(("m.png", -1))]
    content = {"tasks": {"one": {"labels": {"0": "a", "1": "b"}}}, "training": rows}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    dataset = TaskDataset(load_data_list(tmp_path, "segmentation", 2), "training", 1, 8)
    assert dataset[0]["label"].sum() == 32 and (dataset[1]["label"] == -1).all()
    assert dataset[1]["label"].shape == dataset[1]["image"].shape == (1, 8, 8)


def test_wrong_arguments_are_refused(phantoms):
    with pytest.raises(LoRKDError, match="patch_size is for 3D segmentation"):
        TaskDataset(phantoms["classification", 2], "training", 1, 16, patch_size=8)
    with pytest.raises(LoRKDError, match="expected a split"):
        TaskDataset(phantoms["classification", 2], "train", 1, 16)
    with pytest.raises(LoRKDError, match="'cells' has images of 3 channels, the network takes 4"):
        TaskDataset(phantoms["classification", 2], "training", 4, 16)


def test_arrays_that_are_not_finite_are_refused(tmp_path):
    images = np.zeros((4, 8, 8), dtype=np.float32)
    images[2, 3, 3] = np.inf
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=np.array([0, 1, 0, 1]))
    content = {"tasks": {"one": {"labels": {"0": "a", "1": "b"}, "npz": "a.npz"}}}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(LoRKDError, match="task 'one': its arrays hold values that are not finite"):
        TaskDataset(load_data_list(tmp_path, "classification", 2), "training", 1, 8)


def test_an_npz_file_of_mixed_ranges_is_named(tmp_path):
    images = np.full((4, 8, 8), 200, dtype=np.float32)
    images[2] = 0.5
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=np.array([0, 1, 0, 1]))
    content = {"tasks": {"one": {"labels": {"0": "a", "1": "b"}, "npz": "a.npz"}}}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    words = r"an image of .*/a\.npz \(task 'one'\) holds values from 0.5 to 0.5, but white is 255"
    with pytest.raises(LoRKDError, match=words):
        TaskDataset(load_data_list(tmp_path, "classification", 2), "training", 1, 8)
