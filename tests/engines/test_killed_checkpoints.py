"""SIGKILL at random moments, twenty times: the checkpoint can always be read, and the run ends as if nothing was."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from lorkd_monai.handlers import RunCheckpoint
from tests.engines.tiny_run import network, trainer

KILLS, EPOCHS = 20, 80

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def run(folder: Path) -> None:
    net = network(torch.nn.BatchNorm2d(4))
    engine = trainer(net, epochs=EPOCHS, lr=0.01)
    RunCheckpoint(folder, net, {"optimizer": engine.optimizer}, {"seed": 0}).attach(engine)
    engine.run()


def start(folder: Path) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run(folder)
            code = 0
        finally:
            os._exit(code)
    return pid


def epoch_of(folder: Path) -> int:
    """The last epoch on disk; whatever is there must be whole."""
    if (folder / "model.pt").exists():
        torch.load(folder / "model.pt", weights_only=True)
    return torch.load(folder / "last.pt", weights_only=True)["epoch"] if (folder / "last.pt").exists() else 0


def test_twenty_kills(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    begin = time.monotonic()
    pid = start(whole)
    assert os.waitpid(pid, 0)[1] == 0
    length = time.monotonic() - begin
    moments, epochs = random.Random(0), []
    for _ in range(KILLS):
        pid = start(killed)
        last = killed / "last.pt"
        before = last.stat().st_mtime_ns if last.exists() else 0
        until = time.monotonic() + 60
        while (last.stat().st_mtime_ns if last.exists() else 0) == before and time.monotonic() < until:
            time.sleep(0.001)  # until this process has trained an epoch
        time.sleep(moments.uniform(0, 3 * length / EPOCHS))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        epochs.append(epoch_of(killed))
    assert epochs == sorted(epochs)
    print(f"epochs of the checkpoints: {epochs}")
    assert len(set(epochs)) > 3
    pid = start(killed)
    assert os.waitpid(pid, 0)[1] == 0
    assert epoch_of(killed) == EPOCHS
    one, other = (torch.load(folder / "last.pt", weights_only=True) for folder in (whole, killed))
    assert one["best"] == other["best"]
    assert all(torch.equal(one["network"][key], other["network"][key]) for key in one["network"])
    assert not [path for path in killed.iterdir() if path.name.startswith(".")]
