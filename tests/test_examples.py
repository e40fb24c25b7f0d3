"""Every example of a docstring runs: what it shows as its answer is compared, and what it only calls must end well.

An example sees the names of its module and the public names of all rooms. Files and objects that it does not make
itself are made by what FILES and OBJECTS have under their names.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path

import monai
import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import DataLoader
from PIL import Image
from torch import nn

from lorkd_monai.bundle import export_experts, network_info
from lorkd_monai.checkpoints.packs import save_pack
from lorkd_monai.checkpoints.weights import save_weights
from lorkd_monai.data import DataList, make_phantoms
from lorkd_monai.networks import LoRKDNet
from lorkd_monai.tasks import TaskSpec
from lorkd_monai.teachers.teacher import Teacher

PACKAGE = Path(__file__).resolve().parents[1] / "lorkd_monai"
PUBLIC = ("bundle", "checkpoints.packs", "data", "engines", "handlers", "losses", "networks", "transforms")
SLOW = {"lorkd_monai.teachers.vista.vista_teacher"}  # VISTA3D itself


def found() -> Iterator[tuple[str, str, str]]:
    """Module, name and text of every example."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for name, docstring in docstrings(ast.parse(path.read_text(encoding="utf-8"))):
            lines = docstring.splitlines()
            for start, line in enumerate(lines):
                if line.rstrip(":") in ("Example", "Examples"):
                    rest = lines[start + 1 :]
                    end = next((i for i, text in enumerate(rest) if text and text[0] != " "), len(rest))
                    yield module, name, textwrap.dedent("\n".join(rest[:end])).strip()


def docstrings(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, ast.Module) and ast.get_docstring(tree):
        yield "", ast.get_docstring(tree)
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            yield f"{prefix}{node.name}", ast.get_docstring(node) or ""
            yield from docstrings(node, f"{prefix}{node.name}.")


def network_of(kind: str, dims: int, tasks: dict[str, dict[int, str]]) -> LoRKDNet:
    """A small decomposition that can be exported."""
    data = DataList("examples", Path(), kind, dims, {n: TaskSpec(n, i, c) for i, (n, c) in enumerate(tasks.items())})
    if kind == "classification":
        backbone = {"_target_": "ResNet", "block": "basic", "layers": [1, 1, 1, 1], "block_inplanes": [4, 4, 8, 8],
                    "spatial_dims": dims, "n_input_channels": 3}  # fmt: skip
    else:
        backbone = {"_target_": "UNet", "spatial_dims": dims, "in_channels": 1, "channels": [4, 8], "strides": [2]}
    channels = 3 if kind == "classification" else 1
    return LoRKDNet(backbone, data.num_classes, info=network_info(data, channels, 16))


def breast_and_xray() -> LoRKDNet:
    return network_of("classification", 2, {"breast": {0: "no", 1: "yes"}, "xray": {i: f"class {i}" for i in range(6)}})


def organs() -> LoRKDNet:
    return network_of("segmentation", 3, {"spleen": {0: "background", 1: "spleen"}})


def picture(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8)).save(path)


def volume(path: Path, mask: bool = False) -> None:
    values = np.random.default_rng(0).normal(size=(20, 24, 18)).astype(np.float32)
    nib.save(nib.Nifti1Image((values > 0).astype(np.uint8) if mask else values, np.eye(4)), path)


def scans(folder: Path) -> None:
    folder.mkdir()
    volume(folder / "scan.nii.gz")


def pictures_by_class(folder: Path) -> None:
    for name in ("no", "yes"):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            picture(folder / name / f"P{i}_{name}.png")


def decathlon(folder: Path) -> None:
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    listed = []
    for i in range(10):
        case = {"image": f"./imagesTr/case{i}.nii.gz", "label": f"./labelsTr/case{i}.nii.gz"}
        volume(folder / case["image"])
        volume(folder / case["label"], mask=True)
        listed.append(case)
    content = {"labels": {"0": "background", "1": "organ"}, "modality": {"0": "CT"}, "training": listed}
    (folder / "dataset.json").write_text(json.dumps(content))


def nnunet(folder: Path) -> None:
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    for i in range(10):
        volume(folder / "imagesTr" / f"case{i}_0000.nii.gz")
        volume(folder / "labelsTr" / f"case{i}.nii.gz", mask=True)
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "spleen": 1}, "numTraining": 10}
    (folder / "dataset.json").write_text(json.dumps({**content, "file_ending": ".nii.gz"}))


def experts(folder: Path) -> None:
    export_experts(breast_and_xray(), folder, formats=["pt"])


def deployed(folder: Path) -> None:
    export_experts(organs(), folder, formats=["pt"])


def checkpoint(file: Path) -> None:
    file.parent.mkdir(parents=True)
    save_weights(file, organs().state_dict())


def pack(folder: Path) -> None:
    torch.manual_seed(0)
    save_pack(breast_and_xray(), folder)


FILES = {
    "scan.png": picture,
    "scan.nii.gz": volume,
    "scans": scans,
    "data": lambda folder: make_phantoms(folder, "segmentation", 3, num_images=10, image_size=16),
    "ultrasound": pictures_by_class,
    "xray": pictures_by_class,
    "Task04_Hippocampus": decathlon,
    "Dataset009_Spleen": nnunet,
    "experts": experts,
    "output/experts": experts,
    "output/training/model.pt": checkpoint,
    "app/models": deployed,
    "pack": pack,
    "newer": pack,  # the same shared weights
}


class FourTasks(list):
    """A data set of 64 images of four tasks."""

    def __init__(self) -> None:
        super().__init__({"image": torch.rand(3, 16, 16), "label": 0, "task": i % 4} for i in range(64))
        self.task_of_item = [item["task"] for item in self]


OBJECTS = {
    "net": breast_and_xray,
    "x": lambda: torch.rand(2, 3, 64, 64),
    "image": lambda: torch.rand(3, 16, 16),
    "task": lambda: TaskSpec("breast", 0, {0: "no", 1: "yes"}),
    "network": lambda: nn.Conv2d(3, 3, 3, padding=1),
    "teacher": lambda: Teacher(nn.Conv2d(3, 2, 3), {"spleen": [0, 1]}, {"spleen": 2}),
    "dataset": FourTasks,
    "loader": lambda: DataLoader(FourTasks(), batch_size=8),
    "trainer": lambda: Engine(lambda engine, batch: None),
    "device": lambda: torch.device("cpu"),
}


def namespace(module: str, code: str) -> dict[str, object]:
    """What the example sees, with the objects that it uses and does not make."""
    names = {"torch": torch, "nn": nn, "np": np, "monai": monai, "DataLoader": DataLoader}
    for room in PUBLIC:
        content = vars(importlib.import_module(f"lorkd_monai.{room}"))
        names.update((name, content[name]) for name in content["__all__"])
    names.update(vars(importlib.import_module(module)))
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
    made = {node.id for node in nodes if isinstance(node.ctx, ast.Store)}
    names.update((name, OBJECTS[name]()) for name in OBJECTS if name in {node.id for node in nodes} - made)
    return names


EXAMPLES = list(found())


def marked(module: str, name: str, text: str) -> object:
    full = f"{module}.{name}"
    return pytest.param(module, name, text, id=full, marks=[pytest.mark.slow] if full in SLOW else [])


@pytest.mark.parametrize(("module", "name", "text"), [marked(*example) for example in EXAMPLES])
def test_example(module, name, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shown = doctest.DocTestParser().get_doctest(text, {}, name, module, 0)
    code = "".join(example.source for example in shown.examples) or text
    for file, make in FILES.items():
        if f'"{file}"' in code or f'"{file}/' in code:
            make(tmp_path / file)
    shown.globs = namespace(module, code)
    if shown.examples:
        assert doctest.DocTestRunner(verbose=False).run(shown).failed == 0, capsys.readouterr().out
    else:
        exec(compile(code, f"<example of {module}.{name}>", "exec"), shown.globs)


def test_examples_are_found():
    """None is overlooked for its form, and none is prepared that is not there."""
    lines = [s.strip() for p in PACKAGE.rglob("*.py") for s in p.read_text(encoding="utf-8").splitlines()]
    assert sum(line.rstrip(":") in ("Example", "Examples") for line in lines) == len(EXAMPLES) > 30
    code = "\n".join(text for *_, text in EXAMPLES)
    assert sum(line.startswith(">>> ") for line in lines) == code.count(">>> ")
    assert all(f'"{file}"' in code or f'"{file}/' in code for file in FILES)
    assert {f"{module}.{name}" for module, name, _ in EXAMPLES} >= SLOW
