"""Files that an earlier version wrote still load: a run, a checkpoint, a pack, an expert bundle.

``tests/data/commit_2227887`` was made by that commit: `pretraining` and `training` of the 2D classification bundle with
the small networks of ``kinds.SMALL`` (one epoch, batch_size 8) on ``make_phantoms(…, "classification", 2, 12)``,
a pack of the result, and what the network answered.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from lorkd_monai.bundle import check_bundle, load_expert
from lorkd_monai.checkpoints.packs import load_pack
from lorkd_monai.checkpoints.weights import load_decomposition
from lorkd_monai.data import make_phantoms

OLD = Path(__file__).resolve().parent.parent / "data" / "commit_2227887"


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return torch.load(OLD / "expected.pt", weights_only=True)


@pytest.mark.parametrize(
    "load", [lambda: load_decomposition(OLD / "training/model.pt"), lambda: load_pack(OLD / "pack")]
)
def test_a_checkpoint_and_a_pack_give_the_answers_that_they_gave(load, expected):
    net = load().eval()
    assert {f"y_{task}" for task in net.tasks} == set(expected) - {"x"}
    with torch.no_grad():
        for task in net.tasks:
            torch.testing.assert_close(net(expected["x"], task), expected[f"y_{task}"], rtol=1e-6, atol=1e-6)


def test_an_expert_bundle_gives_the_answers_that_it_gave(expected):
    network = load_expert(OLD / "expert/cells_classification").eval()
    with torch.no_grad():
        y = network(expected["x"])
    torch.testing.assert_close(y, expected["y_cells"][:, : y.shape[1]], rtol=1e-5, atol=1e-5)
    assert check_bundle(OLD / "expert/cells_classification", thorough=False, for_zoo=False) == []


def test_a_run_goes_on(bundle_run, tmp_path):
    make_phantoms(tmp_path / "data", "classification", 2, 12, seed=0)
    for part in ("training", "teacher"):
        shutil.copytree(OLD / part, tmp_path / "out" / part)
    done = bundle_run("training", tmp_path / "data", tmp_path / "out", max_epochs=2)
    assert done.code == 0, done.out[-3000:] + done.err[-3000:]
    assert "DecompositionTrainer - INFO - Epoch[2] Complete" in done.out
    assert "DecompositionTrainer - INFO - Epoch[1] Complete" not in done.out
    assert len(list((tmp_path / "out" / "experts").iterdir())) == 4
