"""Several processes: the metrics of one, and runs that go on with another number of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kinds import arguments

from lorkd_monai.checkpoints.weights import load_decomposition
from lorkd_monai.data import make_phantoms

pytestmark = pytest.mark.slow
KIND = "2d_classification"
# Norms for each task would see two images of a task in a step of two processes.
NETWORK = {"backbone__block_inplanes": "[8,16,16,16]", "learning_rate": 0.004, "norm": "shared"}
REPOSITORY = Path(__file__).resolve().parents[2]


def torchrun(
    processes: int, data: Path, output: Path, run_id: str = "training", config: str = "", **options: object
) -> subprocess.CompletedProcess:
    """A run of so many processes on the CPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    config = config or ("train.yaml" if processes == 1 else "train.yaml,multi_gpu_train.yaml")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    given = arguments(KIND, run_id, data, output, config=config, transfer_weight=0, **options)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", *(launcher if processes > 1 else []), "-m", "monai.bundle", *given],
        env=environment, cwd=output.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the processes that torchrun has started, too
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


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
        done = torchrun(processes, data, found[processes], max_epochs=16, batch_size=16 // processes, **NETWORK)
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
    assert scores[1].pop("steps") == pytest.approx(scores[2].pop("steps"), abs=16)  # epochs are rounded up by one
    mean = {processes: sum(own.values()) / len(own) for processes, own in scores.items()}
    assert min(mean.values()) > 0.9  # both have learned
    assert abs(mean[1] - mean[2]) < 0.05


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(first, then, data, outputs, tmp_path):
    output = Path(shutil.copytree(outputs[first], tmp_path / "output"))
    options = {"batch_size": 16 // first, "overwrite": True, **NETWORK}
    done = torchrun(then, data, output, max_epochs=17, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "resuming after epoch 16 of 17" in done.stdout
    assert torch.load(output / "training" / "last.pt", weights_only=True)["epoch"] == 17
    done = torchrun(then, data, output, max_epochs=18, **{**options, "batch_size": 16 // then})
    assert done.returncode == 1
    assert f"belongs to a run with other settings: batch_size was {16 // first}, now {16 // then}" in done.stderr


def test_two_processes_add_a_task(data, outputs, tmp_path):
    output = Path(shutil.copytree(outputs[1], tmp_path / "output"))
    content = json.loads((data / "dataset.json").read_text())
    first, *others = content["tasks"]
    content["tasks"]["again"] = content["tasks"].pop(first)
    for task in others:
        del content["tasks"][task]
    for split in ("training", "validation", "test"):
        content[split] = [{**item, "task": "again"} for item in content[split] if item["task"] == first]
    (data / "again.json").write_text(json.dumps(content))
    config = "train.yaml,add.yaml,multi_gpu_train.yaml"
    done = torchrun(2, data / "again.json", output, run_id="adding", config=config, batch_size=8, max_epochs=2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    before = load_decomposition(output / "training" / "model.pt").eval()
    net = load_decomposition(output / "adding" / "model.pt").eval()
    assert net.tasks == [*before.tasks, "again"]
    for task in before.tasks:
        own, plain = net.extract(task).state_dict(), before.extract(task).state_dict()
        assert all(torch.equal(own[key], plain[key]) for key in plain)
    assert any(v.any() for k, v in net.expert_state_dict("again").items() if k.endswith("lora_B"))
