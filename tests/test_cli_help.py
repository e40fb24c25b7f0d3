"""``--help`` shows what a command is, and never runs it."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], "lorkd"),
        (["phantoms", "out", "--help"], "lorkd phantoms"),
        (["data", "folders", "a", "b", "-h"], "lorkd data folders"),
    ],
)
def test_help_runs_nothing(tmp_path, arguments, shown):
    command = [sys.executable, "-m", "lorkd_monai", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert f"NAME\n    {shown}" in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["phantoms", "out", "--kinds", "x"], "error: Could not consume arg: --kinds. `lorkd phantoms --help`"),
        (
            ["phantoms", "out", "classification", "2", "20", "0", "False", "upper"],
            "error: Could not consume arg: upper",
        ),
        (["data", "folders", "[a]", "out", "--patients_regex", "x"], "error: Could not consume arg: --patients_regex"),
        (["phantoms"], "error: The function received no value for the required argument: output"),
        (["phantom", "out"], "error: Cannot find key: phantom. `lorkd --help`"),
        (["phantoms", "2024"], "error: output: expected a path, got 2024; write ./2024"),
        (["phantoms", "file/x"], "error: Not a directory: file"),
    ],
)
def test_what_does_not_fit_is_one_line_and_runs_nothing(tmp_path, arguments, message):
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "lorkd_monai", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
