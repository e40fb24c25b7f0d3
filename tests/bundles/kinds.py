"""Runs of the training bundles of all kinds, small enough for a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
KINDS = ("2d_classification", "3d_classification", "2d_segmentation", "3d_segmentation")

# As on a machine where this package is not installed.
WITHOUT_US = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lorkd_monai":
            raise ImportError("lorkd_monai is not installed here")
for name in [n for n in sys.modules if n.split(".")[0] == "lorkd_monai"]:
    del sys.modules[name]
sys.meta_path.insert(0, Refuse())
"""

_RESNET = {
    f"{network}#{key}": value
    for network in ("backbone", "teacher_backbone")
    for key, value in (("block_inplanes", "[4,8,8,8]"), ("layers", "[1,1,1,1]"))
}
_UNET = {
    f"{network}#{key}": value
    for network in ("backbone", "teacher_backbone")
    for key, value in (("channels", "[4,8]"), ("strides", "[2]"), ("num_res_units", "1"))
}
_COMMON = {"batch_size": "4", "max_epochs": "1", "pretrain_epochs": "1", "val_interval": "1", "formats": "['pt']"}
SMALL = {
    "2d_classification": {**_COMMON, "image_size": "16", **_RESNET},
    "3d_classification": {**_COMMON, "image_size": "24", **_RESNET},
    "2d_segmentation": {**_COMMON, "image_size": "32", **_UNET},
    "3d_segmentation": {**_COMMON, "image_size": "[16,16,8]", **_UNET},
}


def arguments(
    kind: str, run_id: str, data: Path, output: Path, config: str = "train.yaml", **overrides: object
) -> list[str]:
    """What follows `python -m monai.bundle run`; `__` in a name stands for `#`."""
    bundle = BUNDLES / f"lorkd_{kind}"
    named = {key.replace("__", "#"): str(value) for key, value in overrides.items()}
    small = SMALL[kind] if "train.yaml" in config else {}
    options = {"dataset_dir": data, "output_dir": output, **small, **named}
    files = [str(bundle / "configs" / name) for name in config.split(",")]
    config_file = files[0] if len(files) == 1 else str(files)
    given = ["--bundle_root", str(bundle), "--config_file", config_file]
    return ["run", run_id, *given, *(part for key, value in options.items() for part in (f"--{key}", str(value)))]


def run_kind(launch: Callable, kind: str, run_id: str, data: Path, output: Path, **options: object) -> object:
    """Run a bundle, and give what it left; it must have ended well."""
    done = launch("monai.bundle", *arguments(kind, run_id, data, output, **options))
    assert done.code == 0, done.out[-3000:] + done.err[-3000:]
    return done


def run_expert(launch: Callable, expert: Path, images: Path, output: Path, cwd: Path, **options: object) -> object:
    """Run an expert bundle by itself, from another folder, where this package is not importable."""
    given = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    done = launch(
        "monai.bundle", "run", "--bundle_root", expert, "--config_file", expert / "configs" / "inference.json",
        "--dataset_dir", images, "--output_dir", output, *given, before=WITHOUT_US, cwd=cwd,
    )  # fmt: skip
    assert done.code == 0, done.out[-3000:] + done.err[-3000:]
    return done
