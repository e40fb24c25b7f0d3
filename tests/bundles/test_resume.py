"""A run that is killed goes on as if it had not been; a run that is complete is not repeated."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import torch

# Kill this process in the middle of an epoch, or while an expert is written.
KILL_IN_EPOCH = """
import os, signal
from lorkd_monai.engines import DecompositionTrainer
after = DecompositionTrainer._keep_terms
def keep_terms(self, engine):
    after(self, engine)
    if self.state.iteration == {iteration}:
        os.kill(os.getpid(), signal.SIGKILL)
DecompositionTrainer._keep_terms = keep_terms
"""
KILL_IN_EXPORT = """
import os, signal
import lorkd_monai.bundle.export as export
written = []
write = export.write_expert_bundle
def write_and_die(*args, **kwargs):
    if written:
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(write(*args, **kwargs))
    return written[-1]
export.write_expert_bundle = write_and_die
"""


def same(one: Path, other: Path) -> bool:
    """Whether two weights files hold the same, bit for bit."""
    first, second = (torch.load(path, weights_only=True) for path in (one, other))
    if first.keys() != second.keys():
        return False
    return all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def options(trained: Path) -> dict:
    return {"max_epochs": 3, "val_interval": 2, "teacher_bundle": trained / "teacher", "rotate": 20, "flip_axes": "[1]"}


@pytest.fixture(scope="module")
def whole(bundle_run, phantoms, options, tmp_path_factory) -> Path:
    """The output folder of a run that was not killed."""
    output = tmp_path_factory.mktemp("whole")
    done = bundle_run("training", phantoms, output, **options)
    assert done.code == 0, done.err
    return output


def test_two_runs_with_one_seed_are_the_same(bundle_run, phantoms, trained, tmp_path):
    done = bundle_run("training", phantoms, tmp_path, teacher_bundle=trained / "teacher")
    assert done.code == 0, done.err
    for file in ("training/model.pt", "experts/ct_classification/models/model.pt"):
        assert same(tmp_path / file, trained / file)


@pytest.mark.parametrize("epoch", [1, 3])
def test_killed_training_ends_the_same(epoch, bundle_run, phantoms, options, whole, tmp_path):
    length = torch.load(whole / "training" / "last.pt", weights_only=True)["objects"]["optimizer"]["state"][0]["step"]
    iteration = (epoch - 1) * int(length) // 3 + 2
    done = bundle_run("training", phantoms, tmp_path, before=KILL_IN_EPOCH.format(iteration=iteration), **options)
    assert done.code == -signal.SIGKILL
    assert (tmp_path / "training" / "last.pt").exists() == (epoch > 1)
    assert not (tmp_path / "experts").exists()
    done = bundle_run("training", phantoms, tmp_path, **options)
    assert done.code == 0, done.err
    assert (f"resuming after epoch {epoch - 1} of 3" in done.out) == (epoch > 1)
    for file in ("training/model.pt", "experts/cells_classification/models/model.pt"):
        assert same(tmp_path / file, whole / file)
    states = [torch.load(folder / "training" / "last.pt", weights_only=True) for folder in (tmp_path, whole)]
    assert states[0]["best"] == states[1]["best"]
    assert all(torch.equal(states[0]["network"][key], states[1]["network"][key]) for key in states[1]["network"])


def test_killed_export_is_repeated_without_training(bundle_run, phantoms, options, whole, tmp_path):
    output = Path(shutil.copytree(whole, tmp_path / "output"))
    shutil.rmtree(output / "experts")
    done = bundle_run("training", phantoms, output, before=KILL_IN_EXPORT, **options)
    assert done.code == -signal.SIGKILL
    assert (output / "experts" / "ct_classification").exists()
    done = bundle_run("training", phantoms, output, **options)
    assert done.code == 0, done.err
    assert "Epoch[3] Complete" not in done.out.replace("TaskEvaluator - INFO - Epoch", "")
    assert sorted(path.name for path in (output / "experts").iterdir()) == sorted(
        path.name for path in (whole / "experts").iterdir()
    )
    done = bundle_run("training", phantoms, output, **options)
    assert done.code == 1
    assert "already holds the experts" in done.message


def test_complete_run_only_writes_its_experts_again(bundle_run, phantoms, options, whole, tmp_path):
    output = Path(shutil.copytree(whole, tmp_path / "output"))
    # Nothing may call the trainer's step.
    before = KILL_IN_EPOCH.replace("self.state.iteration == {iteration}", "True")
    done = bundle_run("training", phantoms, output, before=before, overwrite=True, **options)
    assert done.code == 0, done.err
    assert same(output / "training" / "model.pt", whole / "training" / "model.pt")
    written = (output / "experts" / "ct_classification" / "models" / "model.pt").stat().st_mtime_ns
    assert written > (whole / "experts" / "ct_classification" / "models" / "model.pt").stat().st_mtime_ns


def test_killed_pretraining_ends_the_same(bundle_run, phantoms, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    assert bundle_run("pretraining", phantoms, one, pretrain_epochs=2).code == 0
    length = torch.load(one / "pretraining" / "last.pt", weights_only=True)["objects"]["optimizer"]["state"][0]["step"]
    before = KILL_IN_EPOCH.format(iteration=int(length) // 2 + 2)
    assert bundle_run("pretraining", phantoms, other, pretrain_epochs=2, before=before).code == -signal.SIGKILL
    assert bundle_run("pretraining", phantoms, other, pretrain_epochs=2).code == 0
    for file in ("pretraining/model.pt", "teacher/models/model.pt"):
        assert same(one / file, other / file)
