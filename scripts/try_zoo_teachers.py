"""Try every bundle of a folder as a teacher: does what reaches its network equal what its own preprocessing gives?

    git clone https://github.com/Project-MONAI/model-zoo && python scripts/try_zoo_teachers.py model-zoo/models

Each bundle gets random weights and one made-up file of the kind that it reads, at its own spacing and size. Prints a
Markdown table: bundle, "equal" or the refusal, and the largest difference as a part of the range of its own tensor.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from PIL import Image

from lorkd_monai.checkpoints.weights import save_weights
from lorkd_monai.data import TaskSpec
from lorkd_monai.errors import LoRKDError
from lorkd_monai.teachers.bundle import StudentImages, bundle_network, load_teacher
from lorkd_monai.transforms import ItemLoader, preprocessing


def _inputs(folder: Path) -> dict[str, Any]:
    formats = json.loads((folder / "configs" / "metadata.json").read_text()).get("network_data_format") or {}
    first = next(iter((formats.get("inputs") or {}).values()), {})
    outputs = next(iter((formats.get("outputs") or {}).values()), {})
    return {**first, "classes": outputs.get("channel_def") or {}}


def _own_steps(folder: Path) -> list[Any]:
    """The instantiated steps of the bundle's preprocessing, by MONAI alone."""
    from monai.bundle import ConfigParser
    from monai.transforms import Compose

    file = next(f for name in ("json", "yaml") if (f := folder / "configs" / f"inference.{name}").is_file())
    parser = ConfigParser()
    parser.read_config(str(file))
    parser.read_meta(str(folder / "configs" / "metadata.json"))
    parser["bundle_root"] = str(folder)
    return Compose(parser.get_parsed_content("preprocessing")).flatten().transforms


def _made_up(folder: Path, channels: int, dims: int, steps: list[Any], low: int, high: int) -> Any:
    rng = np.random.default_rng(0)
    resized = next((s.resizer.spatial_size for s in steps if type(s).__name__ == "Resized"), (64, 48))
    if dims == 2:
        shape = (int(resized[1]), int(resized[0]))  # PIL's columns × rows
        values = rng.integers(0, 256, (*shape, 3) if channels >= 3 else shape, dtype=np.uint8)
        Image.fromarray(values).save(folder / "picture.png")
        return str(folder / "picture.png")
    spacing = next((s.spacing_transform.pixdim for s in steps if type(s).__name__ == "Spacingd"), np.ones(3))
    files = []
    for i in range(channels):
        values = rng.integers(low, high, (40, 36, 32)).astype(np.int16)
        affine = np.diag([-spacing[0], spacing[1], spacing[2], 1.0])  # stored as LAS
        files.append(str(folder / f"volume{i}.nii.gz"))
        nibabel.save(nibabel.Nifti1Image(values, affine), files[-1])
    return files[0] if channels == 1 else files


def try_bundle(source: Path, work: Path) -> tuple[str, float | None]:
    """What comes of a bundle as a teacher, and the largest difference where it is none that is refused."""
    folder = work / source.name
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.pt", "*.ts", "docs"))
    (folder / "models").mkdir(exist_ok=True)
    try:
        facts = _inputs(folder)
        network, _ = bundle_network(folder)
        save_weights(folder / "models" / "model.pt", network.state_dict())
        dims = 2 if any(isinstance(m, torch.nn.Conv2d) for m in network.modules()) else 3
        del network
        channels = int(facts.get("num_channels") or 1)
        ct = str(facts.get("modality")) == "CT"
        low, high = (-1000, 1000) if ct else (0, 2000)
        known = {"range": [0.0, 255.0] if dims == 2 else [low - 100.0, high + 100.0]}
        try:
            steps = _own_steps(folder)
        except Exception:
            steps = []  # the teacher is refused then, and says why
        file = _made_up(work, channels, dims, steps, low, high)
        names = [name for name in facts["classes"].values() if name.casefold() != "background"]
        labels = {0: "background", 1: names[0]} if names else {0: "background", 1: "object"}
        task = TaskSpec("t", 0, labels, modality="CT" if ct else "MR", intensity=known)
        came = channels if dims == 3 else min(channels, 3)
        student = StudentImages({"t": tuple(known["range"])}, stored=[file], channels=came)
        teacher = load_teacher(folder, {"t": task}, student, channels={"t": [None, 0]}, activation="sigmoid")
        size = [*Image.open(file).size][::-1] if dims == 2 else 32
        kind = "classification" if dims == 2 else "segmentation"
        x = ItemLoader(preprocessing(task, kind, dims, came, size), dims)({"image": file})["image"].as_tensor()[None]
        got = teacher._adapted(x, [0])[0]
        item: Any = {"image": file}
        for step in steps:
            item = step(item)
        own = torch.as_tensor(np.asarray(item["image"])).float()
    except LoRKDError as error:
        return f"refused: {str(error).replace(f'{work}/', '')}", None
    if own.shape != got.shape:
        return f"own shape {tuple(own.shape)}, given {tuple(got.shape)}", None
    return "equal", float((own - got).abs().max() / (own.max() - own.min()))


def main() -> None:
    """Print the table."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of bundles")
    parser.add_argument("bundles", nargs="*", help="names of bundles; all where none is given")
    options = parser.parse_args()
    print("| bundle | as a teacher | largest difference |\n|---|---|---|")
    for source in sorted(f for f in options.folder.iterdir() if (f / "configs" / "metadata.json").is_file()):
        if options.bundles and source.name not in options.bundles:
            continue
        with tempfile.TemporaryDirectory() as work:
            sys.path.insert(0, str(Path(work) / source.name))  # for its own scripts
            said, difference = try_bundle(source, Path(work))
            sys.path.pop(0)
        for name in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
            del sys.modules[name]  # the next bundle has others
        number = "" if difference is None else f"{difference:.1e}"
        print(f"| {source.name} | {' '.join(said.split())[:300]} | {number} |", flush=True)


if __name__ == "__main__":
    main()
