"""The 2D segmentation bundle from end to end, and images of every shape and colour through its experts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from kinds import run_expert, run_kind
from monai.bundle import ConfigParser
from PIL import Image

from lorkd_monai.bundle import check_bundle
from lorkd_monai.checkpoints.weights import load_decomposition
from lorkd_monai.data import TaskDataset, load_data_list, make_phantoms
from lorkd_monai.transforms import preprocessing

TASKS = ["ct", "ultrasound", "mr", "cells"]
PATTERN = "{'*submodule*': 2}"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2D phantoms; the task `mr` has a window of its own."""
    folder = tmp_path_factory.mktemp("images")
    file = make_phantoms(folder, "segmentation", 2, num_images=10, image_size=40)
    content = json.loads(file.read_text())
    content["tasks"]["mr"]["intensity"] = {"range": [10.0, 200.0]}
    file.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def trained(launch, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a pretraining and a training, with imbalanced ranks and more of it in some layers."""
    output = tmp_path_factory.mktemp("trained_2d_segmentation") / "output"
    run_kind(launch, "2d_segmentation", "pretraining", images, output)
    ranks = "{ct: 1, ultrasound: 2, mr: 3, cells: 4}"
    run_kind(launch, "2d_segmentation", "training", images, output, rank=ranks, rank_pattern=PATTERN)
    return output


def test_what_a_run_leaves(trained):
    for task in TASKS:
        assert check_bundle(trained / "experts" / f"{task}_segmentation") == []
    figures = json.loads((trained / "training" / "figures.json").read_text())
    assert list(figures) == TASKS
    assert all({"dice", "nsd", "hd95"} <= set(figures[task]) for task in TASKS)


def test_ranks_of_tasks_and_layers(trained):
    network = load_decomposition(trained / "training" / "model.pt")
    ranks = {name: list(layer.ranks) for name, layer in network.expert_layers.items()}
    doubled = [name for name in ranks if "submodule" in name]
    assert doubled
    assert len(doubled) < len(ranks)
    for name, found in ranks.items():
        assert found == ([2, 4, 6, 8] if name in doubled else [1, 2, 3, 4])


def test_evaluate_config_gives_the_figures(launch, images, trained):
    ranks = "{ct: 1, ultrasound: 2, mr: 3, cells: 4}"
    done = run_kind(
        launch, "2d_segmentation", "run", images, trained, config="train.yaml,evaluate.yaml", rank=ranks,
        rank_pattern=PATTERN,
    )  # fmt: skip
    assert "| task | n | experts | teacher |" in done.out
    figures = json.loads((trained / "figures.json").read_text())
    assert figures["experts"] == json.loads((trained / "training" / "figures.json").read_text())


SHAPES = {"grey": (30, 47), "colour": (47, 30, 3), "alpha": (33, 20, 4), "large": (64, 90)}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("task", ["mr", "cells"])
def test_any_image_gives_a_mask_of_its_size(task, name, launch, images, trained, tmp_path):
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[: SHAPES[name][0], : SHAPES[name][1]]
    array = 100 + 90 * np.sin(rows / 5) * np.cos(columns / 9) + rng.uniform(0, 20, rows.shape)
    if len(SHAPES[name]) == 3:
        array = np.stack([array, 255 - array, array / 2, np.full_like(array, 255)][: SHAPES[name][2]], axis=-1)
    Image.fromarray(array.round().astype(np.uint8)).save(tmp_path / "image.png")
    run_expert(launch, trained / "experts" / f"{task}_segmentation", tmp_path / "image.png", tmp_path / "out", tmp_path)
    (file,) = (tmp_path / "out").iterdir()
    mask = Image.open(file)
    assert mask.mode == "L"
    assert mask.size == SHAPES[name][1::-1]

    spec = load_data_list(images, "segmentation", 2).tasks[task]
    parser = ConfigParser(
        {
            "forward": {"_target_": "Compose", "transforms": preprocessing(spec, "segmentation", 2, 3, 32)},
            "back": {"_target_": "Invertd", "keys": "pred", "transform": "@forward", "orig_keys": "image",
                     "nearest_interp": False, "to_tensor": True},
        }
    )  # fmt: skip
    item = parser.get_parsed_content("forward")({"image": str(tmp_path / "image.png")})
    network = load_decomposition(trained / "training" / "model.pt").eval()
    with torch.no_grad():
        item["pred"] = network(item["image"][None], task)[0, : spec.num_classes]
    expected = parser.get_parsed_content("back")(item)["pred"].argmax(0).numpy()
    assert (np.asarray(mask) == expected).mean() > 0.999
    scaling = [s for s in preprocessing(spec, "segmentation", 2, 3, 32) if s["_target_"] == "ScaleIntensityRanged"]
    stored = json.loads((trained / "experts" / f"{task}_segmentation" / "configs" / "inference.json").read_text())
    assert scaling[0] in stored["preprocessing"]["transforms"]


@pytest.mark.parametrize("task", TASKS)
def test_experts_give_the_decomposition_s_masks(task, launch, images, trained, tmp_path):
    data = load_data_list(images, "segmentation", 2)
    items = TaskDataset(data, "test", 3, 32, progress=False)
    index = next(i for i, item in enumerate(items.items) if item["task"] == task)
    image = items.items[index]["image"]
    run_expert(launch, trained / "experts" / f"{task}_segmentation", Path(image), tmp_path / "out", tmp_path)
    run_kind(
        launch, "2d_segmentation", "run", Path(image), trained, config="inference.yaml", task=task,
        predictions_dir=tmp_path / "decomposed",
    )  # fmt: skip
    one, other = (np.asarray(Image.open(next((tmp_path / d).iterdir()))) for d in ("out", "decomposed"))
    np.testing.assert_array_equal(one, other)
    assert one.shape == np.asarray(Image.open(image)).shape[:2]


def test_medical_formats_as_2d_images(tmp_path):
    """A PNG, a JPEG-like colour file and a 16-bit PNG go through one list; each reaches 0..1."""
    folder = tmp_path / "list"
    folder.mkdir()
    rng = np.random.default_rng(0)
    arrays = {
        "grey.png": rng.integers(0, 255, (20, 30)).astype(np.uint8),
        "colour.png": rng.integers(0, 255, (20, 30, 3)).astype(np.uint8),
        "deep.png": rng.integers(0, 65535, (20, 30)).astype(np.uint16),
        "scan.tif": rng.integers(0, 255, (20, 30)).astype(np.uint8),
    }
    Image.fromarray((arrays["grey.png"] > 100).astype(np.uint8)).save(folder / "mask.png")
    tasks, rows = {}, []
    for name, array in arrays.items():
        Image.fromarray(array).save(folder / name)
        task = name.replace(".", "_")
        tasks[task] = {"labels": {"0": "background", "1": "bright"}}
        rows.append({"image": name, "label": "mask.png", "task": task})
    (folder / "dataset.json").write_text(json.dumps({"name": "x", "tasks": tasks, "training": rows}))
    data = load_data_list(folder, "segmentation", 2)
    for item in TaskDataset(data, "training", 3, 30, progress=False):
        assert item["image"].shape == (3, 30, 30)
        assert item["image"].min() >= 0
        assert 0.9 < item["image"].max() <= 1
        assert item["label"].shape == (1, 30, 30)
