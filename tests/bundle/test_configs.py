"""The fine-tuning and evaluation of an expert read the list that it came from, whatever its files are called."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from PIL import Image

from lorkd_monai.bundle.formats import build_network
from lorkd_monai.data import load_data_list
from lorkd_monai.tasks import TaskSpec
from lorkd_monai.transforms import postprocessing, preprocessing
from lorkd_monai.transforms.loading import ItemLoader

CLASSES = ["benign", "malignant", "other"]


def workflow(expert: Path, *names: str, **overrides: Any) -> ConfigWorkflow:
    files = [str(expert / "configs" / f"{name}.json") for name in names]
    made = ConfigWorkflow(files, logging_file=False, workflow_type=None, bundle_root=str(expert), **overrides)
    made.initialize()
    return made


def write_list(folder: Path, splits: dict[str, list], task: str = "task_2d", **more: Any) -> Path:
    entry = {"labels": {str(i): name for i, name in enumerate(CLASSES)}, **more.pop("entry", {})}
    content = {"name": "a", "tasks": {task: entry, **more}, "training": [], "validation": [], "test": [], **splits}
    path = folder / "dataset.json"
    path.write_text(json.dumps(content))
    return path


def picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    return path


def check_items(case: Any, run: ConfigWorkflow, data: Path) -> None:
    """The evaluation sees what the package's own reading of the list gives, to the last bit."""
    given = case.arguments
    items = load_data_list(data, "classification", given["spatial_dims"], needs=()).test
    load = ItemLoader(given["preprocessing"], given["spatial_dims"])
    seen = run.parser.get_parsed_content("validate#dataset")
    assert len(seen) == len(items) > 0
    for got, item in zip(seen, items, strict=True):
        assert torch.equal(got["image"].as_tensor(), load(item)["image"].as_tensor())
        assert got["label"] == item["label"]


def evaluated(expert: Path, output: Path, **overrides: Any) -> ConfigWorkflow:
    run = workflow(expert, "train", "evaluate", output_dir=str(output), **overrides)
    run.run()
    (row,) = (output / "metrics.csv").read_text().splitlines()
    assert 0 <= float(row.split(",")[1]) <= 1
    return run


# The name of the folder of the images: that of the task, of a key, of a split, of a class, a number.
@pytest.mark.parametrize("name", ["task_2d", "image", "task", "label", "training", "benign", "1", "a b/0"])
def test_folders_may_be_called_anything(make_case, tmp_path, monkeypatch, name):
    case = make_case("2d_classification")
    splits = {
        split: [
            {"image": f"{name}/{split}{i}.png", "label": i % 3, "task": "task_2d", "fold": None} for i in range(count)
        ]
        for split, count in (("training", 4), ("validation", 3), ("test", 7))
    }
    for number, item in enumerate(item for rows in splits.values() for item in rows):
        picture(tmp_path / item["image"], number)
    write_list(tmp_path, splits)
    monkeypatch.chdir(tmp_path)  # the task's name is a folder here too
    check_items(case, evaluated(case.folder, tmp_path / "eval", dataset_dir=str(tmp_path)), tmp_path)
    run = workflow(case.folder, "train", dataset_dir=str(tmp_path), ckpt_dir=str(tmp_path / "ft"), max_epochs=1)
    run.run()
    assert len(run.parser.get_parsed_content("train#dataset")) == 4 and (tmp_path / "ft" / "model.pt").is_file()


def test_a_folder_that_is_a_number_and_a_list_by_another_name(make_case, tmp_path, monkeypatch):
    case = make_case("2d_classification")
    items = [{"image": str(picture(tmp_path / "2024" / f"{i}.png", i).name), "label": i % 3, "task": "task_2d"}
             for i in range(5)]  # fmt: skip
    (tmp_path / "2024").mkdir(exist_ok=True)
    write_list(tmp_path / "2024", {"test": items})
    monkeypatch.chdir(tmp_path)
    # The command line makes a number of 2024.
    check_items(case, evaluated(case.folder, tmp_path / "a", dataset_dir=2024), tmp_path / "2024")
    file = (tmp_path / "2024" / "dataset.json").rename(tmp_path / "2024" / "list.json")
    check_items(case, evaluated(case.folder, tmp_path / "b", dataset_dir="2024/list.json"), file)
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text(file.read_text())
    check_items(case, evaluated(case.folder, tmp_path / "c", dataset_dir="2024", data_list=str(elsewhere)), file)


@pytest.mark.parametrize(("kind", "shape", "dtype"), [
    ("2d_classification", (36, 40), "uint8"), ("2d_classification", (36, 40, 3), "uint8"),
    ("2d_classification", (36, 40, 4), "uint8"), ("2d_classification", (36, 40), "uint16"),
    ("3d_classification", (18, 20, 16), "uint8"), ("3d_classification", (18, 20, 16, 1), "float32"),
])  # fmt: skip
def test_arrays_of_an_npz_file(make_case, tmp_path, kind, shape, dtype):
    case = make_case(kind)
    noise = np.random.default_rng(0)
    arrays = {}
    for stem, count in (("train", 4), ("val", 3), ("test", 9)):
        top = 2**16 if dtype == "uint16" else 256
        arrays[f"{stem}_images"] = noise.integers(0, top, (count, *shape)).astype(dtype)
        arrays[f"{stem}_labels"] = (np.arange(count) % 3)[:, None]
    np.savez(tmp_path / "all.npz", **arrays)
    write_list(tmp_path, {}, case.arguments["task"].name, entry={"npz": "all.npz"})
    check_items(case, evaluated(case.folder, tmp_path / "eval", dataset_dir=str(tmp_path)), tmp_path)
    run = workflow(case.folder, "train", dataset_dir=str(tmp_path), ckpt_dir=str(tmp_path / "ft"), max_epochs=1)
    run.run()
    assert len(run.parser.get_parsed_content("train#dataset")) == 4 and (tmp_path / "ft" / "model.pt").is_file()


def test_images_with_a_file_for_each_channel(make_case, tmp_path):
    case = make_case("3d_segmentation")
    task = TaskSpec("ct", 0, {0: "background", 1: "lesion"}, modality="MR")
    config = {**case.arguments["network_config"], "in_channels": 2}
    steps = [preprocessing(task, "segmentation", 3, 2, 16, keys) for keys in (("image",), ("image", "label"))]
    expert = case.write(
        tmp_path / "ct_segmentation", task=task, network=build_network(config), network_config=config, in_channels=2,
        preprocessing=steps[0], train_preprocessing=steps[1], postprocessing=postprocessing(task, "segmentation", 3),
        formats=("pt",),
    )  # fmt: skip
    noise, rows = np.random.default_rng(0), []
    (tmp_path / "ct").mkdir()
    for i in range(2):
        mask = noise.integers(0, 2, (18, 16, 20)).astype(np.uint8)
        for name, array in (("a", noise.random(mask.shape)), ("b", noise.random(mask.shape)), ("mask", mask)):
            nib.save(nib.Nifti1Image(array.astype(np.float32), np.eye(4)), tmp_path / "ct" / f"{name}{i}.nii.gz")
        rows.append({"image": [f"ct/a{i}.nii.gz", f"ct/b{i}.nii.gz"], "label": f"ct/mask{i}.nii.gz", "task": "ct"})
    splits = {"training": rows[:1], "validation": rows, "test": rows}
    (tmp_path / "dataset.json").write_text(json.dumps(splits))
    run = workflow(expert, "train", dataset_dir=str(tmp_path), ckpt_dir=str(tmp_path / "ft"), max_epochs=1)
    run.run()
    assert (tmp_path / "ft" / "model.pt").is_file()
    evaluated(expert, tmp_path / "eval", dataset_dir=str(tmp_path))
    per_image = list(csv.reader((tmp_path / "eval" / "val_mean_dice_raw.csv").open()))
    assert [Path(row[0]).name for row in per_image[1:]] == ["a0.nii.gz", "a1.nii.gz"]


@pytest.mark.parametrize("missing", [None, -1])
def test_images_without_a_label_are_left_out(make_case, tmp_path, missing):
    case = make_case("2d_classification")
    for i in range(6):
        picture(tmp_path / f"{i}.png", i)
    rows = [{"image": f"{i}.png", "label": i % 3 if i < 4 else missing, "task": "task_2d"} for i in range(6)]
    write_list(tmp_path, {"training": [*rows, "5.png"], "test": rows})
    run = workflow(case.folder, "train", "evaluate", dataset_dir=str(tmp_path))
    assert [item["label"] for item in run.parser.get_parsed_content("train#dataset#data")] == [0, 1, 2, 0]
    assert [item["label"] for item in run.parser.get_parsed_content("validate#dataset#data")] == [0, 1, 2, 0]


def refused(expert: Path, data: Path, *names: str, **overrides: Any) -> str:
    with pytest.raises(SystemExit) as stopped:
        workflow(expert, *names, dataset_dir=str(data), **overrides).run()
    message = str(stopped.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def test_nothing_to_work_on_is_refused_in_one_line(make_case, tmp_path):
    case = make_case("2d_classification")
    rows = [{"image": picture(tmp_path / f"{i}.png", i).name, "label": i % 3, "task": "task_2d"} for i in range(3)]
    said = refused(case.folder, tmp_path, "train", "evaluate")
    assert f"no labelled test item of task 'task_2d': there is no file '{tmp_path}/dataset.json'" in said
    write_list(tmp_path, {"training": rows})
    assert "no labelled validation item of task 'task_2d' in" in refused(case.folder, tmp_path, "train")
    assert "no labelled test item of task 'task_2d' in" in refused(case.folder, tmp_path, "train", "evaluate")
    others = [{**row, "task": "skin"} for row in rows]
    write_list(tmp_path, {"training": others, "validation": others, "test": others}, task="skin")
    said = refused(case.folder, tmp_path, "train")
    assert "no labelled training item" in said and "which has the tasks skin" in said and "--task" in said
    evaluated(case.folder, tmp_path / "eval", dataset_dir=str(tmp_path), task="skin")


@pytest.mark.parametrize("classes", [["malignant", "benign", "other"], ["benign", "malignant"], ["benign", "x", "y"]])
def test_other_classes_are_refused(make_case, tmp_path, classes):
    case = make_case("2d_classification")
    rows = [{"image": picture(tmp_path / f"{i}.png", i).name, "label": i % 2, "task": "task_2d"} for i in range(3)]
    labels = {"labels": {str(i): name for i, name in enumerate(classes)}}
    write_list(tmp_path, {"training": rows, "validation": rows, "test": rows}, entry=labels)
    for names in (["train"], ["train", "evaluate"]):
        said = refused(case.folder, tmp_path, *names)
        assert ", ".join(classes) in said and "benign, malignant, other in this bundle" in said


@pytest.mark.parametrize("text", ["$(rm -rf /)", "@device", "a  b", "x@#y", "p/q", "细胞"])
def test_a_class_by_any_name_is_the_same_class(make_case, tmp_path, text):
    case = make_case("2d_classification")
    task = TaskSpec("task_2d", 0, {0: text, 1: "malignant", 2: "other"})
    expert = case.write(tmp_path / "task_2d_classification", task=task, formats=("pt",), check=False)
    rows = [{"image": picture(tmp_path / f"{i}.png", i).name, "label": i % 3, "task": "task_2d"} for i in range(3)]
    labels = {"labels": {str(i): name for i, name in task.labels.items()}}
    write_list(tmp_path, {"test": rows}, entry=labels)
    evaluated(expert, tmp_path / "eval", dataset_dir=str(tmp_path))


def augmentation_of(expert: Path, **overrides: Any) -> tuple[dict, ConfigParser]:
    config = json.loads((expert / "configs" / "train.json").read_text())
    return config, ConfigParser({**config, **overrides})


@pytest.mark.parametrize("kind", ["2d_classification", "3d_segmentation"])
def test_fine_tuning_augments_as_the_decomposition_did(make_case, tmp_path, kind):
    case = make_case(kind)
    dims, work = case.arguments["spatial_dims"], case.arguments["kind"]
    parent = {"augmentation": {"rotate": 12.0, "flip_axes": [1]}}
    expert = case.write(tmp_path / f"a_{work}", parent=parent, formats=("pt",), check=False)
    for folder, rotate, axes in ((case.folder, 0.0, []), (expert, 12.0, [1])):
        config, parser = augmentation_of(folder, image_only=True)
        assert (config["rotate"], config["flip_axes"]) == (rotate, axes)
        steps = config["train"]["preprocessing"]["transforms"]
        start = next(i for i, step in enumerate(steps) if isinstance(step, str))
        flips = parser.get_parsed_content(f"train#preprocessing#transforms#{start}")
        ramp = torch.arange(8.0).reshape(1, *[8 if axis == 1 else 1 for axis in range(dims)]).expand(1, *[8] * dims)
        seen = set()
        for seed in range(20):
            flips.set_random_state(seed)
            got = flips({"image": ramp, "label": ramp})
            seen.add(tuple(got["image"].select(1, 0).flatten()[:8].tolist()) if dims == 2
                     else tuple(got["image"][0, 0, :, 0].tolist()))  # fmt: skip
            assert work != "segmentation" or torch.equal(got["image"], got["label"])
        assert len(seen) == (2 if axes else 1)
        affine = parser.get_parsed_content(f"train#preprocessing#transforms#{start + 1}")
        assert affine.rand_affine.rand_affine_grid.rotate_range == pytest.approx(
            [np.radians(rotate)] * (1 if dims == 2 else 3)
        )
