"""Batches of few tasks in whole runs: every run id, resumed, with views of a cached teacher, by two processes."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from kinds import run_kind
from test_processes import torchrun
from test_resume import KILL_IN_EPOCH, same

from lorkd_monai.checkpoints.weights import load_decomposition
from lorkd_monai.data import make_phantoms

OPTIONS = {"tasks_per_batch": 2, "transfer_weight": 0, "max_epochs": 2, "nested": True, "accumulation_steps": 2}


@pytest.fixture(scope="module")
def few(bundle_run, phantoms, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("few") / "output"
    done = bundle_run("training", phantoms, output, **OPTIONS)
    assert done.code == 0, done.err
    return output


def test_a_killed_run_draws_the_same_batches_again(bundle_run, phantoms, few, tmp_path):
    done = bundle_run("training", phantoms, tmp_path, before=KILL_IN_EPOCH.format(iteration=9), **OPTIONS)
    assert done.code == -signal.SIGKILL
    done = bundle_run("training", phantoms, tmp_path, **OPTIONS)
    assert done.code == 0, done.err
    assert "resuming after epoch 1 of 2" in done.out
    assert same(tmp_path / "training" / "model.pt", few / "training" / "model.pt")


def test_a_run_with_other_batches_is_not_resumed(bundle_run, phantoms, few):
    done = bundle_run("training", phantoms, few, **{**OPTIONS, "tasks_per_batch": "None", "overwrite": True})
    assert done.code == 1
    assert "settings: tasks_per_batch was 2, now None" in done.message


def test_more_tasks_than_images_in_a_batch(bundle_run, phantoms, tmp_path):
    done = bundle_run("training", phantoms, tmp_path / "out", tasks_per_batch=9)
    assert done.message.endswith("error: tasks_per_batch must be at most batch_size (8), got 9")
    assert not (tmp_path / "out").exists()


def test_views_of_a_cached_teacher(bundle_run, phantoms, trained, tmp_path):
    options = {"tasks_per_batch": 1, "cache_teacher": 2, "max_epochs": 2, "teacher_bundle": trained / "teacher"}
    done = bundle_run("training", phantoms, tmp_path, **options)
    assert done.code == 0, done.err
    assert any((tmp_path / "teacher_cache").rglob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["3d_classification", "2d_segmentation", "3d_segmentation"])
def test_all_kinds(kind, launch, tmp_path):
    data, output = tmp_path / "data", tmp_path / "output"
    make_phantoms(data, kind[3:], int(kind[0]), num_images=10, image_size=24 if kind[3] == "c" else 16)
    for run_id in ("pretraining", "training"):
        run_kind(launch, kind, run_id, data, output, tasks_per_batch=2)
    network = load_decomposition(output / "training" / "model.pt")
    assert all(torch.isfinite(tensor).all() for tensor in network.parameters())


@pytest.mark.slow
def test_two_processes_have_the_batches_of_one(phantoms, tmp_path):
    """As many steps as with mixed batches, each of both processes' batches."""
    for name, few in (("mixed", "None"), ("few", 2)):
        done = torchrun(2, phantoms, tmp_path / name, tasks_per_batch=few, batch_size=4, norm="shared", max_epochs=1)
        assert done.returncode == 0, done.stderr[-3000:]
    steps = [
        torch.load(tmp_path / name / "training" / "last.pt", weights_only=True)["objects"]["optimizer"]["state"]
        for name in ("mixed", "few")
    ]
    assert steps[0][0]["step"] == steps[1][0]["step"]
