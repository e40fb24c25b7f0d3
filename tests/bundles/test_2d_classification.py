"""The 2D classification bundle from end to end: pretraining, training, evaluating, and its experts by themselves."""

from __future__ import annotations

import csv
import json
import shutil
import sqlite3
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from PIL import Image

from lorkd_monai.bundle.check.checker import check_bundle
from lorkd_monai.checkpoints.weights import load_decomposition
from lorkd_monai.data import TaskDataset, load_data_list

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "lorkd_2d_classification"
TASKS = ["ct", "ultrasound", "mr", "cells"]

# As on a machine where this package is not installed.
WITHOUT_US = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lorkd_monai":
            raise ImportError("lorkd_monai is not installed here")
for name in [n for n in sys.modules if n.split(".")[0] == "lorkd_monai"]:
    del sys.modules[name]
sys.meta_path.insert(0, Refuse())
"""


def scalars(folder: Path) -> set[str]:
    """The names of what stands in the TensorBoard files of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    names = set()
    for file in folder.glob("events.out.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        names |= set(events.Tags()["scalars"])
    return names


def test_what_a_run_leaves(trained, phantoms):
    assert {"last.pt", "model.pt", "figures.json"} <= {path.name for path in (trained / "training").iterdir()}
    assert {"last.pt", "model.pt", "figures.json"} <= {path.name for path in (trained / "pretraining").iterdir()}
    assert sorted(path.name for path in (trained / "experts").iterdir()) == sorted(f"{t}_classification" for t in TASKS)
    state = torch.load(trained / "training" / "last.pt", weights_only=True)
    steps = {int(own["step"]) for own in state["objects"]["optimizer"]["state"].values()}
    assert int(state["objects"]["average"]["n_averaged"]) == max(steps) > 1
    averaged = state["objects"]["average"]
    assert any(not torch.equal(value, averaged[f"module.{key}"]) for key, value in state["network"].items())
    for expert in (trained / "experts").iterdir():
        assert check_bundle(expert, thorough=False) == []
        weights = torch.load(expert / "models" / "model.pt", weights_only=True)
        assert all(isinstance(value, torch.Tensor) for value in weights.values())
    figures = json.loads((trained / "training" / "figures.json").read_text())
    assert list(figures) == TASKS
    readme = (trained / "experts" / "ct_classification" / "docs" / "README.md").read_text()
    row = next(line for line in readme.splitlines() if line.startswith("| balanced_accuracy |"))
    assert float(row.split("|")[2]) == pytest.approx(figures["ct"]["balanced_accuracy"]["value"], abs=1e-3)


def test_every_term_is_in_tensorboard(trained):
    names = scalars(trained / "training")
    for term in ("total", "task", "transfer", *(f"task/{task}" for task in TASKS)):
        assert any(name == term or name.endswith(f"/{term}") for name in names), (term, names)
    assert any("mean_balanced_accuracy" in name for name in names)
    assert any("mean_balanced_accuracy" in name for name in scalars(trained / "pretraining"))


def test_evaluating_reports_experts_and_teacher(bundle_run, phantoms, trained, tmp_path):
    output = Path(shutil.copytree(trained, tmp_path / "output"))
    done = bundle_run("evaluating", phantoms, output)
    assert done.code == 0, done.err
    assert "| task | n | experts | teacher |" in done.out
    figures = json.loads((output / "figures.json").read_text())
    assert list(figures) == ["experts", "teacher", "data"]
    assert figures["experts"] == json.loads((output / "training" / "figures.json").read_text())
    assert figures["teacher"] == json.loads((output / "pretraining" / "figures.json").read_text())
    shutil.rmtree(output / "teacher")
    done = bundle_run("evaluating", phantoms, output)
    assert done.code == 0, done.err
    assert list(json.loads((output / "figures.json").read_text())) == ["experts", "data"]


@pytest.fixture(scope="module")
def as_arrays(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tasks as arrays that are not square, in grey and colour; and each test image as a PNG file."""
    folder = tmp_path_factory.mktemp("arrays")
    content = json.loads((phantoms / "dataset.json").read_text())
    rng = np.random.default_rng(0)
    for number, task in enumerate(TASKS):
        shape = (20, 27, 3) if task == "cells" else (27, 20) if task == "ct" else (16, 16) if task == "mr" else (18, 24)
        # Smooth images with a gradient along each axis: a swapped axis or channel changes every probability.
        rows, columns = np.meshgrid(np.linspace(0, 1, shape[0]), np.linspace(0, 1, shape[1]), indexing="ij")
        arrays = {}
        for split, count in (("train", 2), ("val", 2), ("test", 3)):
            images = np.stack([120 * rows + 60 * columns**2 + rng.uniform(0, 60, shape[:2]) for _ in range(count)])
            if len(shape) == 3:
                images = np.stack([images, 200 - images / 2, 20 + images / 5], axis=-1)
            arrays[f"{split}_images"] = images.round().astype(np.uint8)
            arrays[f"{split}_labels"] = np.arange(count)[:, None] % 2
        np.savez(folder / f"{task}.npz", **arrays)
        content["tasks"][task]["npz"] = f"{task}.npz"
        (folder / task).mkdir()
        for i, image in enumerate(arrays["test_images"]):
            Image.fromarray(image).save(folder / task / f"{number}_{i}.png")
    (folder / "dataset.json").write_text(json.dumps({"name": content["name"], "tasks": content["tasks"]}))
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_experts_alone_give_the_decomposition_s_probabilities(task, trained, as_arrays, launch, tmp_path):
    expert = Path(shutil.copytree(trained / "experts" / f"{task}_classification", tmp_path / f"{task}_classification"))
    done = launch(
        "monai.bundle", "run", "--bundle_root", expert, "--config_file", expert / "configs" / "inference.json",
        "--dataset_dir", as_arrays / task, "--output_dir", tmp_path / "out", before=WITHOUT_US, cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.out + done.err
    rows = list(csv.reader((tmp_path / "out" / "predictions.csv").open()))
    classes = len(rows[0]) - 2
    predicted = torch.tensor([[float(value) for value in row[1 : 1 + classes]] for row in rows[1:]])

    data = load_data_list(as_arrays, "classification", 2)
    items = TaskDataset(data, "test", in_channels=3, image_size=16)
    chosen = [items[i] for i, item in enumerate(items.items) if item["task"] == task]
    network = load_decomposition(trained / "training" / "model.pt").eval()
    with torch.no_grad():
        logits = network(torch.stack([item["image"] for item in chosen]), torch.stack([i["task"] for i in chosen]))
    expected = logits[:, : network.num_classes[task]].softmax(1)
    assert predicted.shape == expected.shape == (3, network.num_classes[task])
    assert (predicted - expected).abs().max() < 1e-5
    assert (expected[0] - expected[1]).abs().max() > 1e-7


OVERRIDES = {
    "ranks, layout, shared norms": {
        "rank": "{'ct': 1, 'ultrasound': 2, 'mr': 3, 'cells': 4}",
        "alpha": 2.5,
        "layout": "conv",
        "norm": "shared",
        "rank_pattern": "{'*layer4*': 2}",
        "exclude": "['conv1']",
        "image_size": 20,
        "temperature": 1.5,
        "val_interval": 2,
    },
    "no teacher, grey, accumulated": {
        "transfer_weight": 0,
        "in_channels": 1,
        "accumulation_steps": 2,
        "sampling": "balanced",
        "flip_axes": "[1]",
        "amp": True,
        "max_epochs": 1,
        "batch_size": 5,
        "teacher_bundle": "/no/such/folder",
        "val_interval": 3,
    },
    "no experts": {"rank": 0, "max_epochs": 1, "sampling": "natural", "weight_decay": 0},
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_overrides(name, bundle_run, phantoms, trained, tmp_path):
    options = {"teacher_bundle": trained / "teacher", **OVERRIDES[name]}
    done = bundle_run("run", phantoms, tmp_path / "out", **options)
    assert done.code == 0, done.err
    network = load_decomposition(tmp_path / "out" / "training" / "model.pt")
    spec = network.spec()
    if name.startswith("ranks"):
        assert spec["rank"] == {"ct": 1, "ultrasound": 2, "mr": 3, "cells": 4}
        assert (spec["layout"], spec["norm"], spec["alpha"]) == ("conv", "shared", 2.5)
        assert "conv1" not in network.expert_layers
        assert spec["info"]["image_size"] == 20
    elif name.startswith("no teacher"):
        assert spec["info"]["in_channels"] == 1
        assert not any("transfer" in name for name in scalars(tmp_path / "out" / "training"))
    else:
        assert not network.expert_layers
    for expert in (tmp_path / "out" / "experts").iterdir():
        assert check_bundle(expert, thorough=False) == []


def test_teacher_that_lacks_a_task_teaches_it_by_features(bundle_run, phantoms, trained, tmp_path):
    data = Path(shutil.copytree(phantoms, tmp_path / "data"))
    content = json.loads((data / "dataset.json").read_text())
    content["tasks"]["mr"]["labels"] = {"0": "something", "1": "else"}
    (data / "dataset.json").write_text(json.dumps(content))
    done = bundle_run("training", data, tmp_path / "out", teacher_bundle=trained / "teacher")
    assert done.code == 0, done.err
    assert any("feature_transfer" in name for name in scalars(tmp_path / "out" / "training"))
    state = torch.load(tmp_path / "out" / "training" / "last.pt", weights_only=True)
    assert any("projection.weight" in key for key in state["objects"]["loss"])
    done = bundle_run("evaluating", data, tmp_path / "out", teacher_bundle=trained / "teacher")
    assert done.code == 0, done.err


def test_tracking_by_mlflow(bundle_run, phantoms, trained, tmp_path):
    pytest.importorskip("mlflow")
    output = tmp_path / "out"
    done = bundle_run("training", phantoms, output, max_epochs=1, tracking="mlflow", teacher_bundle=trained / "teacher")
    assert done.code == 0, done.err[-3000:]
    with sqlite3.connect(output / "mlruns.db") as store:
        metrics = {name for (name,) in store.execute("select distinct key from metrics")}
    assert {"total", "task", "transfer"} <= metrics


def test_required_properties(phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which initialize replaces
    config = BUNDLE / "configs" / "train.yaml"
    places = {"bundle_root": str(BUNDLE), "dataset_dir": str(phantoms), "output_dir": str(tmp_path)}
    workflow = ConfigWorkflow(str(config), logging_file=False, workflow_type="train", transfer_weight=0, **places)
    workflow.initialize()
    assert not workflow.check_properties()
