"""The files of a study: whole or not at all, in their place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lorkd_monai.errors import LoRKDError
from lorkd_monai.study.files import RunFile, read_json, read_runs, write_json

CONTENT = {"setting": "full", "method": "mtl", "seed": 3, "mean": float("nan"), "curve": [1.0, float("inf")]}


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = RunFile(tmp_path, "full", "mtl", 3)
    assert not run.done
    run.write(CONTENT, {"0_label": np.arange(3)})
    assert run.done and [r.json for r in read_runs(tmp_path)] == [run.json]
    assert run.read()["mean"] is None and run.read()["curve"] == [1.0, None]
    assert run.read_arrays()["0_label"].tolist() == [0, 1, 2]
    assert sorted(p.name for p in run.json.parent.iterdir()) == ["seed3.json", "seed3.npz"]


def test_a_run_without_its_arrays_is_not_done(tmp_path: Path) -> None:
    run = RunFile(tmp_path, "full", "mtl", 3)
    run.write(CONTENT, {})
    run.arrays.unlink()
    assert not run.done and read_runs(tmp_path) == []


@pytest.mark.parametrize("name", ["../x", "A", "", "a b", "_a"])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(LoRKDError, match="names of settings and methods"):
        RunFile(tmp_path, "full", name, 0)


def test_a_moved_file_is_refused(tmp_path: Path) -> None:
    run, other = RunFile(tmp_path, "full", "mtl", 3), RunFile(tmp_path, "full", "stl", 3)
    run.write(CONTENT, {})
    write_json(other.json, read_json(run.json))
    with pytest.raises(LoRKDError, match="says that it is"):
        other.read()


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_broken_file_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(LoRKDError, match="a.json"):
        read_json(path)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.97])
def test_arrays_that_are_cut_off_are_an_error(tmp_path: Path, share: float) -> None:
    run = RunFile(tmp_path, "full", "mtl", 3)
    run.write(CONTENT, {"0_label": np.random.default_rng(0).random(1000)})
    data = run.arrays.read_bytes()
    run.arrays.write_bytes(data[: int(share * len(data))])
    with pytest.raises(LoRKDError, match="can't be read"):
        run.read_arrays()


def test_broken_arrays_are_an_error(tmp_path: Path) -> None:
    run = RunFile(tmp_path, "full", "mtl", 3)
    run.write(CONTENT, {})
    run.arrays.write_bytes(b"no zip")
    with pytest.raises(LoRKDError, match="can't be read"):
        run.read_arrays()


def test_a_failed_write_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 1
