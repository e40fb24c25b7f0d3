"""The 3D classification bundle from end to end, and its experts by themselves on volumes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from kinds import run_expert, run_kind

from lorkd_monai.bundle import check_bundle
from lorkd_monai.checkpoints.weights import load_decomposition
from lorkd_monai.data import TaskDataset, load_data_list, make_phantoms

TASKS = ["ct", "ultrasound", "mr"]


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3D phantoms, NIfTI files and .npz; the task `ct` has a window of its own."""
    folder = tmp_path_factory.mktemp("volumes")
    file = make_phantoms(folder, "classification", 3, num_images=20, image_size=16)
    content = json.loads(file.read_text())
    content["tasks"]["ct"]["intensity"] = {"range": [-250.0, 250.0]}
    file.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def trained(launch, volumes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a pretraining and a training."""
    output = tmp_path_factory.mktemp("trained_3d_classification") / "output"
    run_kind(launch, "3d_classification", "pretraining", volumes, output)
    run_kind(launch, "3d_classification", "training", volumes, output, norm="task")
    return output


def test_what_a_run_leaves(trained):
    for task in TASKS:
        expert = trained / "experts" / f"{task}_classification"
        assert check_bundle(expert) == []
    steps = json.loads((trained / "experts" / "ct_classification" / "configs" / "inference.json").read_text())
    scaling = [s for s in steps["preprocessing"]["transforms"] if s["_target_"] == "ScaleIntensityRanged"]
    assert [scaling[0]["a_min"], scaling[0]["a_max"]] == [-250.0, 250.0]


def test_evaluating(launch, volumes, trained):
    done = run_kind(launch, "3d_classification", "evaluating", volumes, trained, norm="task")
    assert "| task | n | experts | teacher |" in done.out
    figures = json.loads((trained / "figures.json").read_text())
    assert list(figures["experts"]) == TASKS
    assert set(figures["experts"]["ct"]) >= {"balanced_accuracy", "accuracy"}


def probabilities(file: Path, classes: int) -> torch.Tensor:
    rows = list(csv.reader(file.open()))
    return torch.tensor([[float(value) for value in row[1 : 1 + classes]] for row in rows[1:]])


@pytest.mark.parametrize("task", TASKS)
def test_experts_alone_give_the_decomposition_s_probabilities(task, launch, volumes, trained, tmp_path):
    data = load_data_list(volumes, "classification", 3)
    items = TaskDataset(data, "test", 1, 24, progress=False)
    chosen = [i for i, item in enumerate(items.items) if item["task"] == task]
    folder = tmp_path / "files"
    folder.mkdir()
    for i in chosen:
        image = items.items[i]["image"]
        if isinstance(image, str):
            nib.load(image).to_filename(folder / f"{i:03d}.nii.gz")
        else:  # an array of an .npz file, whose axes are taken as they are, which is RAS for a file
            nib.save(nib.Nifti1Image(image, np.eye(4)), folder / f"{i:03d}.nii.gz")
    run_expert(launch, trained / "experts" / f"{task}_classification", folder, tmp_path / "out", tmp_path)
    run_kind(
        launch, "3d_classification", "run", folder, trained, config="inference.yaml", task=task,
        predictions_dir=tmp_path / "decomposed",
    )  # fmt: skip
    network = load_decomposition(trained / "training" / "model.pt").eval()
    classes = network.num_classes[task]
    with torch.no_grad():
        expected = network(torch.stack([items[i]["image"] for i in chosen]), task)[:, :classes].softmax(1)
    for place in ("out", "decomposed"):
        found = probabilities(tmp_path / place / "predictions.csv", classes)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < 1e-5
    heads = [next(csv.reader((tmp_path / place / "predictions.csv").open())) for place in ("out", "decomposed")]
    assert heads[0] == heads[1] == ["file", *data.tasks[task].labels.values(), "class"]
