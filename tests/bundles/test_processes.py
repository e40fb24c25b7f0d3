"""Several processes: the metrics of one, and runs that go on with another number of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kinds import arguments

from lorkd_monai.data import make_phantoms

pytestmark = pytest.mark.slow
KIND = "2d_classification"
REPOSITORY = Path(__file__).resolve().parents[2]


def torchrun(processes: int, data: Path, output: Path, **options: object) -> subprocess.CompletedProcess:
    """`training` by so many processes on the CPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    config = "train.yaml" if processes == 1 else "train.yaml,multi_gpu_train.yaml"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    given = arguments(KIND, "training", data, output, config=config, transfer_weight=0, **options)
    return subprocess.run(
        [sys.executable, "-W", "ignore", *(launcher if processes > 1 else []), "-m", "monai.bundle", *given],
        env=environment, cwd=output.parent, capture_output=True, text=True, timeout=400,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_phantoms(folder, "classification", 2, num_images=80, image_size=24)
    return folder


@pytest.fixture(scope="module")
def outputs(data, tmp_path_factory) -> dict[int, Path]:
    """What one process, and two, leave of the same number of steps of equal batches."""
    found = {}
    for processes in (1, 2):
        found[processes] = tmp_path_factory.mktemp(f"by_{processes}") / "output"
        options = {"max_epochs": 12, "batch_size": 16 // processes, "backbone__block_inplanes": "[8,16,16,16]"}
        done = torchrun(processes, data, found[processes], **options)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return found


def test_two_processes_end_with_the_metrics_of_one(outputs):
    scores = {}
    for processes, output in outputs.items():
        figures = json.loads((output / "training" / "figures.json").read_text())
        scores[processes] = {task: own["auroc"]["value"] for task, own in figures.items()}
        state = torch.load(output / "training" / "last.pt", weights_only=True)
        scores[processes]["best on validation"] = state["best"]["score"]
        steps = {int(own["step"]) for own in state["objects"]["optimizer"]["state"].values()}
        scores[processes]["steps"] = max(steps)
    print(scores)
    assert scores[1].pop("steps") == pytest.approx(scores[2].pop("steps"), abs=12)  # epochs are rounded up by one
    mean = {processes: sum(own.values()) / len(own) for processes, own in scores.items()}
    assert min(mean.values()) > 0.7  # both have learned
    assert abs(mean[1] - mean[2]) < 0.1


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(first, then, data, outputs, tmp_path):
    output = Path(shutil.copytree(outputs[first], tmp_path / "output"))
    options = {"batch_size": 16 // first, "overwrite": True, "backbone__block_inplanes": "[8,16,16,16]"}
    done = torchrun(then, data, output, max_epochs=13, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "resuming after epoch 12 of 13" in done.stdout
    assert torch.load(output / "training" / "last.pt", weights_only=True)["epoch"] == 13
    done = torchrun(then, data, output, max_epochs=14, **{**options, "batch_size": 16 // then})
    assert done.returncode == 1
    assert f"belongs to a run with other settings: batch_size was {16 // first}, now {16 // then}" in done.stderr
