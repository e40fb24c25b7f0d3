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
