"""Whole runs of the training bundles, as a user starts them, on phantoms and with narrow networks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lorkd_monai.data import make_phantoms

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
BUNDLE = REPOSITORY / "bundles" / "lorkd_2d_classification"

# One epoch of a few batches, a network of a few thousand weights, and no ONNX file.
SMALL = {
    "image_size": "16",
    "batch_size": "8",
    "max_epochs": "2",
    "pretrain_epochs": "1",
    "formats": "['pt']",
    "backbone#block_inplanes": "[4,8,8,8]",
    "teacher_backbone#block_inplanes": "[4,8,8,8]",
    "teacher_backbone#layers": "[1,1,1,1]",
}


@dataclass
class Run:
    """What one command left."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """What stands on standard error after MONAI's own warning about configs."""
        lines = [line for line in self.err.splitlines() if not line.startswith("parsing config_file") and line.strip()]
        return "\n".join(lines)


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Run]]:
    """``launch(module, *arguments, before="", cwd=None)`` runs `python -m module arguments`, see launcher.py."""
    folder = tmp_path_factory.mktemp("launcher")
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(HERE / "launcher.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )

    def run(module: str, *arguments: str, before: str = "", cwd: Path | None = None, env: dict | None = None) -> Run:
        out, err = folder / "out", folder / "err"
        job = {
            "module": module,
            "argv": [str(a) for a in arguments],
            "before": before,
            "cwd": str(cwd or folder),
            "env": env or {},
            "out": str(out),
            "err": str(err),
        }
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, "the launcher died"
        return Run(int(answer), out.read_text(errors="replace"), err.read_text(errors="replace"))

    yield run
    server.stdin.close()
    server.wait()


@pytest.fixture(scope="session")
def bundle_run(launch: Callable[..., Run]) -> Callable[..., Run]:
    """``bundle_run(run_id, data, output_dir, **overrides)``: a run of the 2D classification bundle; `#` is `__`."""

    def run(
        run_id: str, data: Path, output: Path, before: str = "", env: dict | None = None, **overrides: object
    ) -> Run:
        named = {key.replace("__", "#"): str(value) for key, value in overrides.items()}
        options = {"dataset_dir": data, "output_dir": output, **SMALL, **named}
        arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
        config = ["--bundle_root", BUNDLE, "--config_file", BUNDLE / "configs" / "train.yaml"]
        return launch("monai.bundle", "run", run_id, *config, *arguments, before=before, env=env)

    return run


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 2D classification phantoms of four tasks, grey and colour, files and .npz."""
    folder = tmp_path_factory.mktemp("phantoms")
    make_phantoms(folder, "classification", 2, num_images=20, image_size=24)
    return folder


@pytest.fixture(scope="session")
def trained(bundle_run: Callable[..., Run], phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a pretraining and a training."""
    output = tmp_path_factory.mktemp("trained") / "output"
    for run_id in ("pretraining", "training"):
        done = bundle_run(run_id, phantoms, output)
        assert done.code == 0, done.out[-3000:] + done.err[-3000:]
    return output
