"""The types that the package ships (``py.typed``): the checker passes, and a program that uses them passes too."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("mypy")
pytestmark = pytest.mark.slow

PROGRAM = """
from collections.abc import Mapping

import torch
from torch import nn

from lorkd_monai.data import DataList, TaskSpec, load_data_list
from lorkd_monai.errors import LoRKDError
from lorkd_monai.losses import LoRKDLoss
from lorkd_monai.networks import LoRKDNet


def decompose(backbone: nn.Module, folder: str) -> nn.Module:
    data: DataList = load_data_list(folder, "classification", 2)
    task: TaskSpec = data.tasks["spleen"]
    classes: int = task.num_classes
    net = LoRKDNet(backbone, data.num_classes, rank={"spleen": 4})
    own: Mapping[str, torch.Tensor] = net.expert_state_dict("spleen")
    loss = LoRKDLoss("cross_entropy", transfer_weight=0.5)
    try:
        net.add_task("liver", classes)
    except LoRKDError as error:
        print(error, len(own), loss)
    return net.extract("spleen")
"""
MISTAKES = {
    'load_data_list("lists", "classification", "2")': "arg-type",
    'LoRKDNet(nn.Linear(2, 2), ["spleen"])': "arg-type",
    'LoRKDNet(nn.Linear(2, 2), {"spleen": 2}).extract(2.5)': "arg-type",
    'LoRKDNet(nn.Linear(2, 2), {"spleen": 2}, ranks=4)': "call-arg",
    'load_data_list("lists", "classification", 2).task': "attr-defined",
}


def mypy(repository, *arguments):
    program = [sys.executable, "-m", "mypy", "--config-file", str(repository / "pyproject.toml"), *arguments]
    return subprocess.run(program, capture_output=True, text=True, cwd=repository)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 gets an older numpy, whose types are others")
def test_the_package_passes(repository):
    done = mypy(repository)
    assert done.returncode == 0, done.stdout + done.stderr


def test_programs_of_users(repository, tmp_path):
    (tmp_path / "good.py").write_text(PROGRAM)
    wrong = PROGRAM + "\n\n" + "\n".join(MISTAKES) + "\n"
    (tmp_path / "wrong.py").write_text(wrong)
    done = mypy(
        repository, "--strict", "--follow-imports=silent", str(tmp_path / "good.py"), str(tmp_path / "wrong.py")
    )
    lines = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(lines) == len(MISTAKES), done.stdout + done.stderr
    first = len(wrong.splitlines()) - len(MISTAKES) + 1
    for number, (line, code) in enumerate(zip(lines, MISTAKES.values(), strict=True), first):
        assert f"wrong.py:{number}: error:" in line and f"[{code}]" in line
