"""Phantoms: all four kinds, the same for the same seed, and easy to tell apart."""

from __future__ import annotations

import pytest
import torch
from filelock import FileLock

from lorkd_monai.data import TaskDataset, load_data_list, make_phantoms
from lorkd_monai.errors import LoRKDError

KINDS = [(kind, dims) for kind in ("classification", "segmentation") for dims in (2, 3)]


@pytest.mark.parametrize(("kind", "dims"), KINDS)
def test_lists_are_whole_and_every_class_stands_in_every_split(tmp_path, kind, dims):
    file = make_phantoms(tmp_path, kind, dims, num_images=20, image_size=16)
    data = load_data_list(file, kind, dims, needs=("training", "validation", "test"), check_labels=True)
    assert len(data.tasks) == (4 if dims == 2 else 3)
    assert all(count == {"training": 12, "validation": 3, "test": 5} for count in data.counts().values())
    if kind == "classification":
        for split in ("training", "validation", "test"):
            seen = {(item["task"], item["label"]) for item in data.split(split)}
            assert len(seen) == sum(data.num_classes.values())


@pytest.mark.parametrize(("kind", "dims"), KINDS)
def test_same_seed_same_images(tmp_path, kind, dims):
    images = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_phantoms(tmp_path / name, kind, dims, num_images=10, image_size=16, seed=seed)
        dataset = TaskDataset(load_data_list(tmp_path / name, kind, dims), "training", 3 if dims == 2 else 1, 16)
        images.append([item["image"] for item in dataset])
    assert all(torch.equal(x, y) for x, y in zip(images[0], images[1], strict=True))
    assert not all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(images[0], images[2], strict=True))


def test_a_small_network_learns_them(tmp_path):
    make_phantoms(tmp_path, "classification", 2, num_images=60, image_size=32)
    data = load_data_list(tmp_path, "classification", 2)
    train, test = (TaskDataset(data, split, 3, 32) for split in ("training", "test"))
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 5, stride=2),
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, stride=2),
        torch.nn.BatchNorm2d(32),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(128, 4 * 3),
    )

    def whole(dataset):
        items = list(dataset)
        return [torch.stack([item[key] for item in items]) for key in ("image", "label", "task")]

    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    image, label, task = whole(train)
    for epoch in range(40):
        for rows in torch.randperm(len(image), generator=torch.Generator().manual_seed(epoch)).split(16):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(network(image[rows]), task[rows] * 3 + label[rows]).backward()
            optimiser.step()
    network.eval()
    image, label, task = whole(test)
    logits = network(image).view(-1, 4, 3)[torch.arange(len(task)), task]
    right = logits.argmax(1) == label
    for number in range(4):
        assert right[task == number].float().mean() > 0.7


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(LoRKDError, match="expected kind"):
        make_phantoms(tmp_path, "regression", 2)
    with pytest.raises(LoRKDError, match="num_images >= 10"):
        make_phantoms(tmp_path, "segmentation", 2, num_images=2)
    make_phantoms(tmp_path, "classification", 3, num_images=10, image_size=16)
    with pytest.raises(LoRKDError, match="already exists.*overwrite"):
        make_phantoms(tmp_path, "classification", 3, num_images=10, image_size=16)
    make_phantoms(tmp_path, "classification", 3, num_images=10, image_size=16, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(LoRKDError, match="is a file"):
        make_phantoms(tmp_path / "file", "classification", 2)


def test_two_at_once_in_one_folder(tmp_path):
    with FileLock(tmp_path / ".in_use.lock"):  # as another process has it
        with pytest.raises(LoRKDError, match="is in use: another process works in it right now. Wait until"):
            make_phantoms(tmp_path, "classification", 2, num_images=10, image_size=16)
        assert [path.name for path in tmp_path.iterdir()] == [".in_use.lock"]
    assert make_phantoms(tmp_path, "classification", 2, num_images=10, image_size=16).is_file()
    assert not (tmp_path / ".in_use.lock").exists()
