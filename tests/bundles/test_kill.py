"""SIGKILL at any moment: what is on disk can be read, and the run ends as if nothing had happened."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from test_resume import same

from lorkd_monai.checkpoints.weights import load_decomposition

KILLS = 20
# So many times the length of an epoch after the first one that this process has trained; 0: while it starts.
KILL_AFTER = """
import os, signal, threading, time
from ignite.engine import Events
from lorkd_monai.engines import DecompositionTrainer
run, epochs = DecompositionTrainer.run, {epochs}
def die_in(seconds):
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()
def run_and_die(self):
    started = []
    self.add_event_handler(Events.EPOCH_STARTED, lambda: started.append(time.monotonic()))
    def complete():
        if len(started) == 1 and epochs:
            die_in(epochs * (time.monotonic() - started[0]))
    self.add_event_handler(Events.EPOCH_COMPLETED, complete)
    if not epochs:
        die_in({seconds})
    run(self)
DecompositionTrainer.run = run_and_die
"""
# When half of the file that the n-th save writes is on disk.
KILL_IN_SAVE = """
import io, os, signal
import torch
save, calls = torch.save, []
def save_half(state, path, *args, **kwargs):
    calls.append(path)
    if len(calls) < {n}:
        return save(state, path, *args, **kwargs)
    whole = io.BytesIO()
    save(state, whole)
    with open(path, "wb") as file:
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = save_half
"""


@pytest.fixture(scope="module")
def options() -> dict:
    return {"transfer_weight": 0, "max_epochs": 32, "rotate": 20}


@pytest.fixture(scope="module")
def whole(bundle_run, phantoms, options, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "output"
    done = bundle_run("training", phantoms, output, **options)
    assert done.code == 0, done.err
    return output


def check_files(output: Path) -> int:
    """The epoch of the last checkpoint; every file must be whole."""
    last, model = output / "training" / "last.pt", output / "training" / "model.pt"
    if model.exists():
        load_decomposition(model)
    return torch.load(last, weights_only=True)["epoch"] if last.exists() else 0


def test_twenty_kills_at_random_moments(bundle_run, phantoms, options, whole, tmp_path):
    moments, output, killed, found = random.Random(0), tmp_path / "output", 0, []
    while killed < KILLS:
        epochs = moments.uniform(0.01, 1.5) if moments.random() < 0.8 else 0
        before = KILL_AFTER.format(epochs=epochs, seconds=moments.uniform(0, 0.5))
        done = bundle_run("training", phantoms, output, before=before, **options)
        if done.code == 0:  # a fast machine: once more from the start
            shutil.rmtree(output)
            continue
        assert done.code == -signal.SIGKILL, done.err
        killed += 1
        found.append(check_files(output))
    print(f"epochs of the checkpoints: {found}")
    assert len(set(found)) > 5
    done = bundle_run("training", phantoms, output, **options)
    assert done.code == 0, done.err
    assert same(output / "training" / "model.pt", whole / "training" / "model.pt")
    name = "experts/cells_classification/models/model.pt"
    assert same(output / name, whole / name)
    assert not [path for path in (output / "training").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_a_kill_while_a_checkpoint_is_written(n, bundle_run, phantoms, options, whole, tmp_path):
    done = bundle_run("training", phantoms, tmp_path, before=KILL_IN_SAVE.format(n=n), **options)
    assert done.code == -signal.SIGKILL
    check_files(tmp_path)
    done = bundle_run("training", phantoms, tmp_path, **options)
    assert done.code == 0, done.err
    assert same(tmp_path / "training" / "model.pt", whole / "training" / "model.pt")
    assert not [path for path in (tmp_path / "training").iterdir() if path.name.startswith(".")]


pytestmark = pytest.mark.slow
