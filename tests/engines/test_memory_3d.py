"""3D training at 96³ stays under 8 GiB on the CPU: batch 2, MONAI's UNet of five levels, three tasks, a teacher."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "memory_3d.py"


@pytest.mark.slow
def test_peak_memory_of_3d_training():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), "--iterations", "1"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peak = float(re.search(r"peak ([\d.]+) GiB", done.stdout).group(1))
    assert 0.5 < peak < 8
