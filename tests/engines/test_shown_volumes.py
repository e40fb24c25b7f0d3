"""A teacher from elsewhere sees the values of the volumes' files: whole, uncut, in the student's patches."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from monai.bundle import ConfigParser
from monai.inferers import SlidingWindowInferer
from torch import nn

from lorkd_monai import engines
from lorkd_monai.checkpoints.weights import save_weights
from lorkd_monai.data import TaskDataset, load_data_list, make_phantoms
from lorkd_monai.engines import DecompositionTrainer, find_teacher
from lorkd_monai.errors import LoRKDError
from lorkd_monai.losses import LoRKDLoss
from lorkd_monai.networks import LoRKDNet
from lorkd_monai.transforms import BatchAugment, augment_together, default_intensity

UNET = {
    "_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "channels": [2, 4], "strides": [2], "norm": "instance",
}  # fmt: skip
ZSCORE = {"_target_": "NormalizeIntensityd", "keys": "image"}
WINDOW = {
    "_target_": "ScaleIntensityRanged", "keys": "image", "a_min": -160, "a_max": 240, "b_min": 0, "b_max": 1,
    "clip": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One volume of CT to train on, with the default window, and one to test on."""
    folder = tmp_path_factory.mktemp("phantoms")
    make_phantoms(folder, "segmentation", 3, num_images=10, image_size=16)
    data = load_data_list(folder, "segmentation", 3)
    few = {split: [i for i in data.split(split) if i["task"] == "ct"][:1] for split in ("training", "test")}
    return dataclasses.replace(data, **few)


@pytest.fixture(scope="module")
def mr(data):
    folder_items = load_data_list(data.folder, "segmentation", 3)
    return dataclasses.replace(folder_items, training=[i for i in folder_items.training if i["task"] == "mr"][:1])


def write_teacher(folder, data, *values, axcodes="LIA", task="ct"):
    names = list(data.tasks[task].labels.values())
    arguments = {"in_channels": 1, "out_channels": len(names), "kernel_size": 3, "padding": 1}
    steps = [
        {"_target_": "LoadImaged", "keys": "image"},
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
        {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": None},
        {"_target_": "Spacingd", "keys": "image", "pixdim": list(data.tasks[task].spacing), "mode": "bilinear"},
        *values,
        {"_target_": "Orientationd", "keys": "image", "axcodes": axcodes, "labels": None},
    ]
    config = {
        "network_def": {"_target_": "torch.nn.Conv3d", **arguments},
        "preprocessing": {"_target_": "Compose", "transforms": steps},
    }
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    formats = {"inputs": {"image": {"num_channels": 1}}, "outputs": {"pred": {"channel_def": dict(enumerate(names))}}}
    (folder / "configs" / "metadata.json").write_text(json.dumps({"network_data_format": formats}))
    save_weights(folder / "models" / "model.pt", nn.Conv3d(**arguments).state_dict())
    return folder


def own_volume(folder, file):
    parser = ConfigParser(json.loads((folder / "configs" / "inference.json").read_text()))
    return parser.get_parsed_content("preprocessing")({"image": file})["image"].as_tensor()


def one_step(data, dataset, teacher, augment=None):
    """The student's and the teacher's images in one step of training."""
    network = LoRKDNet(UNET, data.num_classes, rank=1)
    kept = {}
    teacher.network.register_forward_pre_hook(lambda module, args: kept.update(teacher=args[0]))
    network.backbone.register_forward_pre_hook(lambda module, args: kept.update(student=args[0]))
    trainer = DecompositionTrainer(
        "cpu", 1, torch.utils.data.DataLoader(dataset, 1), network, torch.optim.SGD(network.parameters(), 0.0),
        LoRKDLoss("dice_ce", 1.0, tasks=data.num_classes), teacher, augment,
    )  # fmt: skip
    trainer.run()
    return kept["student"], kept["teacher"]


@pytest.mark.parametrize("window", [False, True])
def test_whole_volumes_equal_the_teachers_own(window, data, tmp_path):
    wide = {**WINDOW, "a_min": -963.8, "a_max": 1053.7}
    folder = write_teacher(tmp_path / "teacher", data, wide if window else ZSCORE)
    with pytest.raises(LoRKDError, match="cut to -160..240"):
        find_teacher(folder, data)
    teacher = find_teacher(folder, data, from_files=True)
    dataset = TaskDataset(data, "training", 1, 16, progress=False)
    before = dataset[0]
    dataset.show_to(teacher.intensity.of_values)
    after = dataset[0]
    assert all(torch.equal(before[key], after[key]) for key in before)
    seen = teacher._adapted(after["seen"][None], [0], shown=True)[0]
    torch.testing.assert_close(seen, own_volume(folder, data.training[0]["image"]), rtol=1e-5, atol=1e-5)


def test_volumes_scaled_by_percentiles(mr, tmp_path):
    """Steps that want the values themselves are no reason to refuse any more."""
    other = {"_target_": "ScaleIntensityRanged", "keys": "image", "a_min": 0, "a_max": 1000, "b_min": 0, "b_max": 1}
    folder = write_teacher(tmp_path / "teacher", mr, other, task="mr")
    with pytest.raises(LoRKDError, match="scaled by their own percentiles"):
        find_teacher(folder, mr)
    teacher = find_teacher(folder, mr, from_files=True)
    dataset = TaskDataset(mr, "training", 1, 16, progress=False)
    dataset.show_to(teacher.intensity.of_values)
    seen = teacher._adapted(dataset[0]["seen"][None], [0], shown=True)[0]
    torch.testing.assert_close(seen, own_volume(folder, mr.training[0]["image"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cached", [False, True])
def test_patches_have_the_figures_of_the_whole(cached, data, tmp_path):
    folder = write_teacher(tmp_path / "teacher", data, ZSCORE)
    teacher = find_teacher(folder, data, 1.0, cached, tmp_path / "cache", from_files=True)
    dataset = TaskDataset(data, "training", 1, [8, 8, 8], patch_size=[8, 8, 8], progress=False)
    student, seen = one_step(data, dataset, teacher)
    assert seen.shape[2:] == (8, 8, 8)
    values = own_volume(write_teacher(tmp_path / "raw", data), data.training[0]["image"])
    given = seen.flip([2, 3]).permute(0, 1, 2, 4, 3)  # RAS of LIA
    given = given * values.std(correction=0) + values.mean()
    torch.testing.assert_close(((given + 160) / 400).clamp(0, 1), student, rtol=1e-4, atol=1e-4)


def test_both_are_augmented_alike(data, tmp_path):
    """A teacher who wants what the student sees is shown the same, also after every random change."""
    folder = write_teacher(tmp_path / "teacher", data, WINDOW, axcodes="RAS")
    dataset = TaskDataset(data, "training", 1, 16, patch_size=16, progress=False)
    augment = BatchAugment(3, 20, flip_axes=(0,), noise=0.1, probability=1.0, seed=3)
    student, seen = one_step(data, dataset, find_teacher(folder, data, from_files=True), augment)
    assert dataset._cache[0]["image"].min() == 0 and dataset._cache[0]["image"].max() == 1
    torch.testing.assert_close(seen, student, rtol=1e-5, atol=1e-5)
    assert not torch.equal(student[0], dataset[0]["image"])


def test_augmented_in_their_own_range():
    image = torch.rand(3, 1, 9, 10)
    image[:, :, 0, 0], image[:, :, 0, 1] = 0.0, 1.0
    augment = BatchAugment(2, 20, flip_axes=(1,), probability=1.0, seed=1)
    mask = torch.randint(0, 2, (3, 1, 9, 10))
    plain, moved = augment(image, mask, 5)
    both, moved_too = augment_together(augment, 1)(torch.cat([image, image * 200 - 100, -image], 1), mask, 5)
    assert torch.equal(both[:, :1], plain) and torch.equal(moved_too, moved)
    same, _ = augment_together(augment, 1)(torch.cat([image, image * 200 - 100], 1), None, 5)
    torch.testing.assert_close(same[:, 1:], plain * 200 - 100, rtol=1e-4, atol=1e-3)


def test_the_teacher_is_measured_on_what_it_sees(data, tmp_path, capsys):
    """Its figures are those of its own preprocessing, window by window."""
    folder = write_teacher(tmp_path / "teacher", data, ZSCORE)
    network = LoRKDNet(UNET, data.num_classes, rank=1)
    save_weights(tmp_path / "model.pt", network.state_dict())
    dataset = TaskDataset(data, "test", 1, 16, progress=False)
    loader, inferer = torch.utils.data.DataLoader(dataset, 1), SlidingWindowInferer(16, 1)
    figures = engines.report_figures(
        network, tmp_path / "model.pt", loader, data, "cpu", tmp_path / "figures.json", folder, inferer
    )
    own = own_volume(folder, data.test[0]["image"])
    teacher = find_teacher(folder, data, split="test", from_files=True)
    answer = teacher.network(own[None]).argmax(1, keepdim=True).flip([2, 3]).permute(0, 1, 2, 4, 3)[0, 0]
    label = dataset[0]["label"][0]
    dice = [
        2 * float(((answer == c) & (label == c)).sum()) / float((answer == c).sum() + (label == c).sum())
        for c in (1, 2)
    ]
    assert figures["teacher"]["ct"]["dice"]["value"] == pytest.approx(sum(dice) / 2, abs=1e-3)


def test_a_loader_that_cant_show_volumes(data, tmp_path):
    teacher = find_teacher(write_teacher(tmp_path / "teacher", data, ZSCORE), data, from_files=True)
    with pytest.raises(LoRKDError, match="wants the values of the volumes' files"):
        one_step(data, [{}], teacher)


@pytest.mark.parametrize("size", [12, 16])
def test_volumes_to_classify(size, tmp_path):
    """From files and from the arrays of an .npz, resized as the student's are."""
    make_phantoms(tmp_path, "classification", 3, num_images=10, image_size=16)
    data = load_data_list(tmp_path, "classification", 3)
    dataset = TaskDataset(data, "training", 1, size, progress=False)
    dataset.show_to(lambda values: values * 2)
    ranges = {name: default_intensity(task, 3).get("range") for name, task in data.tasks.items()}
    compared = set()
    for index, item in enumerate(dataset.items):
        shown = dataset[index]
        assert shown["seen"].shape == shown["image"].shape == (1, size, size, size)
        if ranges[item["task"]] is not None and size == 16:  # as it is: what is cut is cut before any resizing
            low, high = ranges[item["task"]]
            scaled = ((shown["seen"] / 2 - low) / (high - low)).clamp(0, 1)
            torch.testing.assert_close(scaled, shown["image"], rtol=1e-5, atol=1e-5)
            compared.add(type(item["image"]))
    assert len(compared) == (2 if size == 16 else 0)


def test_pictures_need_no_files(tmp_path):
    make_phantoms(tmp_path, "classification", 2, num_images=10, image_size=16)
    dataset = TaskDataset(load_data_list(tmp_path, "classification", 2), "training", 3, 16, progress=False)
    dataset.show_to(lambda values: values)
    assert "seen" not in dataset[0]
