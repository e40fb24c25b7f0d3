"""One expert runs where only the packages of its own metadata.json are installed."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_an_expert_runs_with_only_the_packages_it_names(make_case, tmp_path, write_images, repository):
    case = make_case("2d_classification")
    write_images(tmp_path / "images", 2, count=1)
    command = ["bash", str(repository / "scripts" / "clean_env_check.sh"), str(case.folder), str(tmp_path / "images")]
    done = subprocess.run(
        command, env=None, cwd=tmp_path, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    if done.returncode == 3:
        pytest.skip(f"the packages cannot be installed here: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "predictions.csv" in done.stdout


def test_the_script_says_what_it_wants(tmp_path, repository):
    script = str(repository / "scripts" / "clean_env_check.sh")
    done = subprocess.run(["bash", script], capture_output=True, text=True)
    assert done.returncode == 1 and "expected BUNDLE and IMAGES" in done.stderr
    assert sys.executable not in done.stderr
