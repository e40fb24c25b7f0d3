"""Nested experts from a whole run: trained, resumed, exported at a lower rank, drawn against their rank."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from test_resume import KILL_IN_EPOCH, same

from lorkd_monai.bundle import check_bundle
from lorkd_monai.checkpoints.weights import load_decomposition, load_weights

OPTIONS = {"nested": True, "transfer_weight": 0, "max_epochs": 2}


@pytest.fixture(scope="module")
def nested(bundle_run, phantoms, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("nested") / "output"
    done = bundle_run("training", phantoms, output, **OPTIONS)
    assert done.code == 0, done.err
    return output


def test_a_killed_run_draws_the_same_ranks_again(bundle_run, phantoms, nested, tmp_path):
    steps = torch.load(nested / "training" / "last.pt", weights_only=True)["objects"]["optimizer"]["state"][0]["step"]
    before = KILL_IN_EPOCH.format(iteration=int(steps) // 2 + 2)
    done = bundle_run("training", phantoms, tmp_path, before=before, **OPTIONS)
    assert done.code == -signal.SIGKILL
    done = bundle_run("training", phantoms, tmp_path, **OPTIONS)
    assert done.code == 0, done.err
    assert "resuming after epoch 1 of 2" in done.out
    assert same(tmp_path / "training" / "model.pt", nested / "training" / "model.pt")


def test_a_run_that_was_not_nested_is_not_resumed_as_one(bundle_run, phantoms, nested, tmp_path):
    assert bundle_run("training", phantoms, tmp_path, **{**OPTIONS, "nested": False, "max_epochs": 1}).code == 0
    done = bundle_run("training", phantoms, tmp_path, overwrite=True, **OPTIONS)
    assert done.code == 1
    assert "nested: checkpoint None, this network True" in done.message


def test_export_at_a_lower_rank(launch, nested, tmp_path):
    done = launch(
        "lorkd_monai", "export", nested, tmp_path / "experts", "--tasks", "ct", "--rank", 2, "--formats", "pt"
    )
    assert done.code == 0, done.err
    expert = tmp_path / "experts" / "ct_classification"
    assert check_bundle(expert, thorough=False) == []
    expected = load_decomposition(nested / "training" / "model.pt").extract("ct", rank=2).state_dict()
    written = load_weights(expert / "models" / "model.pt")
    assert all(torch.equal(written[key], expected[key]) for key in expected)
    assert "rank of this expert: 2" in (expert / "docs" / "README.md").read_text()
    done = launch("lorkd_monai", "export", nested, tmp_path / "more", "--rank", 0)
    assert done.code == 1
    assert done.message == "error: rank must be a whole number of at least 1, got 0"


def test_rank_curve(launch, phantoms, nested, tmp_path):
    done = launch("lorkd_monai", "rank-curve", nested, phantoms, tmp_path / "curve", "--tasks", "ct,mr")
    assert done.code == 0, done.err
    content = json.loads((tmp_path / "curve" / "rank_curve.json").read_text())
    assert content["score"] == "balanced_accuracy"
    assert list(content["tasks"]) == ["ct", "mr"]
    for points in content["tasks"].values():
        assert [p["rank"] for p in points] == [1, 2, 3, 4]
        assert [p["parameters"] for p in points] == [k * points[0]["parameters"] for k in (1, 2, 3, 4)]
        assert all(0 <= p["low"] <= p["value"] <= p["high"] <= 1 for p in points)
    figures = json.loads((nested / "training" / "figures.json").read_text())
    for task, points in content["tasks"].items():
        assert points[-1]["value"] == pytest.approx(figures[task]["balanced_accuracy"]["value"])
    assert (tmp_path / "curve" / "rank_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "| ct | 1 |" in done.out


def test_rank_curve_of_what_can_not_be_cut(launch, phantoms, trained, nested, tmp_path):
    done = launch("lorkd_monai", "rank-curve", trained, phantoms, tmp_path)
    assert done.code == 1
    assert "was not trained with nested experts" in done.message
    done = launch("lorkd_monai", "rank-curve", nested, phantoms, tmp_path, "--tasks", "spine")
    assert "unknown task 'spine'" in done.message
    hidden = "import sys; sys.modules['matplotlib'] = sys.modules['matplotlib.figure'] = None"
    done = launch("lorkd_monai", "rank-curve", nested, phantoms, tmp_path, before=hidden)
    assert done.code == 1
    assert done.message.endswith("error: drawing needs matplotlib: pip install 'lorkd-monai[plot]'")


def test_remove_task(launch, nested, tmp_path):
    file = tmp_path / "less.pt"
    done = launch("lorkd_monai", "remove-task", nested, "ct", file)
    assert done.code == 0, done.err
    whole, less = load_decomposition(nested / "training" / "model.pt").eval(), load_decomposition(file).eval()
    assert less.tasks == [t for t in whole.tasks if t != "ct"]
    assert [t["index"] for t in less.info["tasks"].values()] == [0, 1, 2]
    x = torch.rand(2, 3, 16, 16)
    for task in less.tasks:
        with torch.no_grad():
            assert torch.equal(less.extract(task)(x), whole.extract(task)(x))
    done = launch("lorkd_monai", "export", file, tmp_path / "experts", "--tasks", less.tasks[0], "--formats", "pt")
    assert done.code == 0, done.err
    for arguments, message in (
        (["ct", file], "less.pt exists already: name another file"),
        (["spine", tmp_path / "other.pt"], "unknown task 'spine': this network has"),
    ):
        done = launch("lorkd_monai", "remove-task", nested, *arguments)
        assert done.code == 1
        assert message in done.message
