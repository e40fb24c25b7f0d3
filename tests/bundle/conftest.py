"""One small expert bundle of each kind of work, written once, and images to run them on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from lorkd_monai.bundle import write_expert_bundle
from lorkd_monai.bundle.configs import Pipeline, pipeline_of
from lorkd_monai.bundle.formats import build_network
from lorkd_monai.tasks import TaskSpec, Work
from lorkd_monai.transforms import postprocessing, preprocessing

KINDS = ("2d_classification", "3d_classification", "2d_segmentation", "3d_segmentation")


@dataclass
class Case:
    """What `write_expert_bundle` was given, and what it wrote."""

    arguments: dict[str, Any]
    folder: Path

    @property
    def network(self) -> torch.nn.Module:
        return self.arguments["network"]

    def write(self, folder: Path, **changes: Any) -> Path:
        return write(folder, **{**self.arguments, **changes})


def write(folder: Path, *, task: TaskSpec, kind: str, spatial_dims: int, in_channels: int, image_size: Any,
          preprocessing: list[dict], postprocessing: list[dict], train_preprocessing: list[dict] | None = None,
          inferer: dict | None = None, **others: Any) -> Path:  # fmt: skip
    """`write_expert_bundle` with the parts of its work and pipeline one by one, so that a test changes one of them."""
    work = Work(kind, spatial_dims, in_channels, image_size, {task.name: task})
    pipeline = pipeline_of(work)
    training = train_preprocessing or (preprocessing if kind == "classification" else pipeline.training)
    pipeline = Pipeline(preprocessing, postprocessing, training, inferer or pipeline.inferer)
    return write_expert_bundle(folder, work=work, pipeline=pipeline, **others)


def network_config(kind: str, dims: int, channels: int, classes: int) -> dict[str, Any]:
    if kind == "classification":
        widths = {"block_inplanes": [4, 4, 8, 8], "layers": [1, 1, 1, 1], "block": "basic"}
        shape = {"spatial_dims": dims, "n_input_channels": channels, "num_classes": classes}
        return {"_target_": "ResNet", **widths, **shape, "shortcut_type": "B"}
    shape = {"spatial_dims": dims, "in_channels": channels, "out_channels": classes}
    return {"_target_": "UNet", **shape, "channels": [4, 8, 8], "strides": [2, 2], "num_res_units": 1}


def arguments_of(kind_of_work: str) -> dict[str, Any]:
    dims, kind = int(kind_of_work[0]), kind_of_work[3:]
    channels, side = (3 if kind_of_work == "2d_classification" else 1), (32 if dims == 2 else 16)
    labels = {0: "background", 1: "lesion"} if kind == "segmentation" else {0: "benign", 1: "malignant", 2: "other"}
    task = TaskSpec(f"task_{dims}d", 0, labels, modality="MR", body_part="brain", note="phantoms")
    torch.manual_seed(dims)
    config = network_config(kind, dims, channels, len(labels))
    return {
        "network": build_network(config),
        "network_config": config,
        "task": task,
        "kind": kind,
        "spatial_dims": dims,
        "in_channels": channels,
        "image_size": [side] * dims,
        "preprocessing": preprocessing(task, kind, dims, channels, side),
        "postprocessing": postprocessing(task, kind, dims),
        "metrics": {"score": {"value": 0.91, "low": 0.85, "high": 0.96, "n": 40}, "auroc": 0.97},
        "parent": {"rank": 4, "tasks": ["task_2d", "b"], "teacher": {"network": "ResNet", "parameters": 12345678}},
    }


@pytest.fixture(scope="session")
def make_case(tmp_path_factory: pytest.TempPathFactory):
    """Give the case of a kind of work such as ``"2d_classification"``; written at the first call."""
    cases: dict[str, Case] = {}

    def make(kind_of_work: str) -> Case:
        if kind_of_work not in cases:
            arguments = arguments_of(kind_of_work)
            name = f"{arguments['task'].name}_{arguments['kind']}"
            folder = tmp_path_factory.mktemp(kind_of_work) / name
            cases[kind_of_work] = Case(arguments, write(folder, **arguments))
        return cases[kind_of_work]

    return make


@pytest.fixture
def case(request: pytest.FixtureRequest, make_case: Any) -> Case:
    """The case that ``@pytest.mark.parametrize("case", KINDS, indirect=True)`` names."""
    return make_case(request.param)


def _write_images(folder: Path, dims: int, count: int = 2) -> list[Path]:
    """Write grey images (PNG, 40×50) or volumes (NIfTI, 20×24×18, oblique and anisotropic) and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    noise, paths = np.random.default_rng(0), []
    affine = np.array([[0.9, -0.3, 0.0, 5.0], [0.3, 1.1, 0.0, -7.0], [0.0, 0.0, 2.5, 3.0], [0.0, 0.0, 0.0, 1.0]])
    for i in range(count):
        if dims == 2:
            paths.append(folder / f"image {i}.png")
            Image.fromarray(noise.integers(0, 256, (40, 50), dtype=np.uint8)).save(paths[-1])
        else:
            paths.append(folder / f"image {i}.nii.gz")
            nib.save(nib.Nifti1Image(noise.normal(size=(20, 24, 18)).astype(np.float32), affine), paths[-1])
    return paths


def _write_masks(images: list[Path], folder: Path) -> list[Path]:
    """Write one mask of classes 0 and 1 for each image, in its geometry."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for image in images:
        path = folder / image.name
        if image.suffix == ".png":
            mask = np.asarray(Image.open(image)) > 128
            Image.fromarray(mask.astype(np.uint8)).save(path)
        else:
            volume = nib.load(image)
            nib.save(nib.Nifti1Image((volume.get_fdata() > 0.5).astype(np.uint8), volume.affine), path)
        paths.append(path)
    return paths


@pytest.fixture
def write_images():
    """The function that writes images into a folder."""
    return _write_images


@pytest.fixture
def write_masks():
    """The function that writes a mask for each image."""
    return _write_masks
