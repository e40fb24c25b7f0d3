"""scripts/results.py: results that are kept with the project, and the tables and pictures made from them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from lorkd_monai.study.files import RunFile

ROOT = Path(__file__).resolve().parent.parent
TASKS = {"a": 2, "b": 3}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("results_script", ROOT / "scripts" / "results.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "docs" / "results")
    return module


def _run(folder: Path, method: str, seed: int, right: float) -> None:
    """A finished run of two tasks of 200 images, of which so many are classified right."""
    random = np.random.default_rng(seed)
    arrays, figures = {}, {}
    for number, (task, classes) in enumerate(TASKS.items()):
        label = np.arange(200) % classes
        called = np.where(random.random(200) < right, label, (label + 1) % classes)
        probability = random.random((200, classes)).astype(np.float32)
        probability[np.arange(200), called] = 1.5
        arrays[f"{number}_label"] = label
        arrays[f"{number}_probability"] = probability / probability.sum(1, keepdims=True)
        figures[task] = {"auroc": {"value": 0.9}}
    content = {
        "method": method,
        "family": "teacher" if method == "teacher" else "lorkd" if method == "few" else "stl",
        "setting": "full",
        "seed": seed,
        "score": "balanced_accuracy",
        "figures": figures,
        "cost": {
            "parameters": 1000,
            "plain": {task: {"parameters": 500, "multiply_adds": 1e6} for task in TASKS},
        },
        "time": {"training_cpu_s": 60.0},
        "data": {"kind": "classification", "tasks": {task: {"scored": True} for task in TASKS}},
        "command": "lorkd study /somewhere/out --dataset_dir /somewhere/else/study.json",
    }
    RunFile(folder, "full", method, seed).write(content, arrays)


@pytest.fixture
def collected(results: ModuleType, tmp_path: Path) -> ModuleType:
    folder = tmp_path / "docs" / "results" / "small"
    folder.mkdir(parents=True)
    plan = {
        "title": "small",
        "experts": "few",
        "rivals": ["teacher", "stl"],
        "labels": {"few": "experts", "teacher": "foundation model", "stl": "single-task"},
        "medmnist": {"a": "Breast"},
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    source = ROOT / "docs" / "results" / "medmnist_v2.csv"
    (folder.parent / "medmnist_v2.csv").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    for seed in (0, 1):
        for method, right in (("few", 0.9), ("teacher", 0.7), ("stl", 0.9), ("tried", 0.5)):
            _run(tmp_path / "study", method, seed, right)
    assert results.collect(tmp_path / "study", "small") == 6
    return results


def test_a_collected_run_keeps_every_answer_and_no_path(collected: ModuleType, tmp_path: Path) -> None:
    before = RunFile(tmp_path / "study", "full", "few", 0)
    after = RunFile(collected.RESULTS / "small", "full", "few", 0)
    assert "somewhere" not in after.json.read_text()
    for key, value in before.read_arrays().items():
        kept = after.read_arrays()[key]
        if key.endswith("_probability"):
            assert kept.dtype == np.float16
            np.testing.assert_array_equal(kept.argmax(1), value.argmax(1))
            np.testing.assert_allclose(kept, value, atol=1e-3)
        else:
            np.testing.assert_array_equal(kept, value)


def test_half_precision_keeps_the_class_of_a_close_call(results: ModuleType) -> None:
    close = np.array([[0.49999, 0.50001], [0.50001, 0.49999], [0.33333, 0.66667]], np.float32)
    kept = results._small({"0_probability": close})["0_probability"]
    np.testing.assert_array_equal(kept.argmax(1), [1, 0, 1])


def test_the_page_shows_the_methods_of_the_plan_alone(collected: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(
        "Before\n<!-- results: small summary full -->\nold\n<!-- end of results -->\n"
        "<!-- results: small differences -->\n<!-- end of results -->\n"
        "<!-- results: small tasks -->\n<!-- end of results -->\nAfter\n"
    )
    (tmp_path / "docs" / "results.md").write_text("no table\n")
    with pytest.raises(SystemExit, match="not up to date"):
        collected.main(["check"])
    collected.main(["write"])
    text = page.read_text()
    assert text.startswith("Before\n") and text.endswith("After\n") and "old" not in text
    assert "| experts | 2 |" in text and "tried" not in text
    assert "experts − foundation model | 2 | **+0.2" in text
    assert (collected.RESULTS / "small" / "rivals_full.png").read_bytes().startswith(b"\x89PNG")
    collected.main(["check"])
    assert (tmp_path / "docs" / "results.md").read_text() == "no table\n"


def test_medmnist_accuracy_is_that_of_the_answers(collected: ModuleType) -> None:
    table = collected.medmnist("small", "full")
    ours = next(line for line in table.splitlines() if line.startswith("| experts (2 seeds)"))
    runs = [RunFile(collected.RESULTS / "small", "full", "few", seed).read_arrays() for seed in (0, 1)]
    right = np.mean([(run["0_probability"].argmax(1) == run["0_label"]).mean() for run in runs])
    assert f"/{right:.3f}".replace("0.", ".") in ours
    assert "| ResNet-18 (28) | 11M | .901/.863 |" in table and "ACS" not in table


def test_an_unknown_table_is_named(collected: ModuleType) -> None:
    from lorkd_monai.errors import LoRKDError

    with pytest.raises(LoRKDError, match="no table 'nothing'"):
        collected.filled("<!-- results: small nothing -->\n<!-- end of results -->")


def test_the_projects_own_pages_are_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("results_script", ROOT / "scripts" / "results.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["check"])
