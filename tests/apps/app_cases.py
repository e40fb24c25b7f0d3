"""Small experts of each kind of work, images for them, and the environments of Label and Deploy."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from lorkd_monai.bundle import write_expert_bundle
from lorkd_monai.bundle.formats import build_network
from lorkd_monai.tasks import TaskSpec, Work

# name -> kind, dimensions, channels, modality, body part, classes. Two share one architecture.
EXPERTS = {
    "tumor": ("segmentation", 3, 1, "MRI", "brain", ["background", "tumor", "$edema/é"]),
    "vessel": ("segmentation", 3, 1, "CT", "head", ["background", "vessel"]),
    "nodule": ("classification", 3, 1, "CT", "chest", ["none", "nodule"]),
    "skin": ("segmentation", 2, 3, "photography", None, ["background", "lesion"]),
    "lung": ("classification", 2, 3, "X-ray", "chest", ["background", "$(touch x) sick", "Ödem"]),
}


def write_expert(folder: Path, name: str, seed: int = 0) -> Path:
    """Write one expert with random weights into ``folder``."""
    kind, dims, channels, modality, part, names = EXPERTS[name]
    task = TaskSpec(name, 0, dict(enumerate(names)), modality=modality, body_part=part, note="phantoms")
    side = 32 if dims == 2 else 16
    if kind == "classification":
        config = {"_target_": "ResNet", "block": "basic", "layers": [1, 1, 1, 1], "block_inplanes": [4, 4, 8, 8]}
        config.update(spatial_dims=dims, n_input_channels=channels, num_classes=len(names), shortcut_type="B")
    else:
        config = {"_target_": "UNet", "channels": [4, 8, 8], "strides": [2, 2], "num_res_units": 1}
        config.update(spatial_dims=dims, in_channels=channels, out_channels=len(names))
    torch.manual_seed(seed + len(name))
    return write_expert_bundle(
        folder / f"{name}_{kind}", network=build_network(config), network_config=config,
        work=Work(kind, dims, channels, (side,) * dims, {name: task}), formats=["pt"], check=False,
    )  # fmt: skip


def smooth(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Random blobs, whole numbers from about -500 to 500."""
    noise = np.random.default_rng(seed).normal(size=shape)
    for axis in range(noise.ndim):
        noise = sum(np.roll(noise, shift, axis) for shift in range(-2, 3))
    return (noise / np.abs(noise).max() * 500).round().astype(np.int16)


def write_volume(path: Path, seed: int = 0) -> Path:
    """A volume of 20×24×18 voxels, turned and of three different spacings, that a DICOM series can hold exactly."""
    turn = np.array([[np.cos(0.2), -np.sin(0.2), 0], [np.sin(0.2), np.cos(0.2), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = np.diag([-1.0, -1.0, 1.0]) @ turn @ np.diag([0.9, 1.3, 2.5])
    affine[:3, 3] = [5, -7, 3]
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(smooth((20, 24, 18), seed), affine), path)
    return path


def write_picture(path: Path, seed: int = 0, colour: bool = False) -> Path:
    """A picture of 40 rows and 50 columns."""
    values = smooth((40, 50, 3) if colour else (40, 50), seed) / 4 + 128
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(path)
    return path


def clean_environ(**more: str) -> dict[str, str]:
    """The variables that a tool's Python runs with: nothing of this checkout, no GPU, one thread as the tests have.

    What it imports is compiled once, also where the shell says that no compiled files are to be written.
    """
    return {**os.environ, "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "",
            "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **more}  # fmt: skip


def tool_environment(repository: Path, name: str) -> Path:
    """The environment of ``scripts/NAME_env.sh``, made now where LORKD_TOOLS=1 asks for it, as scripts/test.sh does.

    LORKD_LABEL_VENV and LORKD_DEPLOY_VENV name another place than ``.venv-NAME``. LORKD_TOOLS=0 skips the test; where
    it is not set, the test runs if the environment is there. What cannot be made fails the test.
    """
    place = os.environ.get(f"LORKD_{name.upper()}_VENV") or str(repository / f".venv-{name}")
    wanted = os.environ.get("LORKD_TOOLS", "")
    if wanted not in ("", "0", "1"):
        pytest.fail(f"LORKD_TOOLS must be 0, 1 or not set, got {wanted!r}")
    if wanted == "0":
        pytest.skip(f"LORKD_TOOLS=0: the environment of {name} is not wanted")
    if not wanted and not Path(place, f"lorkd-{name}.stamp").is_file():
        pytest.skip(f"no environment of {name}: make it with bash scripts/{name}_env.sh, or set LORKD_TOOLS=1")
    started = time.monotonic()
    done = subprocess.run(
        ["bash", str(repository / "scripts" / f"{name}_env.sh"), place],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        problem = (
            f"scripts/{name}_env.sh cannot make {place}; LORKD_TOOLS=0 leaves these tests out.\n{done.stderr[-2000:]}"
        )
        pytest.fail(problem, pytrace=False)
    print(f"the environment of {name} was ready after {time.monotonic() - started:.0f} s")
    return Path(done.stdout.strip().splitlines()[-1])
