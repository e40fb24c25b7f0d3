"""The folders of the apps, and what cannot be made one."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from pathlib import Path

import pytest

from lorkd_monai.apps import write_deploy_app, write_label_app
from lorkd_monai.cli import commands as cli
from lorkd_monai.errors import LoRKDError

WRITERS = [write_label_app, write_deploy_app]


@pytest.mark.parametrize(("write", "models"), [(write_label_app, "model"), (write_deploy_app, "models")])
def test_an_app_holds_copies_of_all_experts_and_no_import_of_this_package(
    write, models: str, experts: Path, tmp_path: Path
) -> None:
    app = write(tmp_path / "app", [experts])

    assert sorted(p.name for p in (app / models).iterdir()) == sorted(p.name for p in experts.iterdir())
    for expert in (app / models).iterdir():
        for name in ("configs/inference.json", "configs/metadata.json", "models/model.pt", "LICENSE"):
            assert (expert / name).read_bytes() == (experts / expert.name / name).read_bytes()
    for file in app.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("lorkd_monai") for name in names)
    for file in (p for p in app.rglob("*") if p.is_file() and p.suffix in (".py", ".yaml", ".txt", ".json")):
        assert str(tmp_path) not in file.read_text(encoding="utf-8")


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda experts, tmp: [], "at least one expert bundle"),
        (lambda experts, tmp: [tmp / "nowhere"], "has no configs/metadata.json"),
        (lambda experts, tmp: [tmp], "has no configs/metadata.json"),
        (
            lambda experts, tmp: [experts, experts / "lung_classification"],
            "two experts are named 'lung_classification'",
        ),
        (
            lambda experts, tmp: [shutil.copytree(experts / "lung_classification", tmp / "lung")],
            "must be named <task>_",
        ),
        (
            lambda experts, tmp: [shutil.copytree(experts / "lung_classification", tmp / "$(x)_classification")],
            "must be named <task>_",
        ),
    ],
)
def test_what_is_no_set_of_experts_is_refused_and_leaves_nothing(
    write, make, message: str, experts: Path, tmp_path: Path
) -> None:
    given = make(experts, tmp_path)
    before = set(tmp_path.iterdir())
    with pytest.raises(LoRKDError, match=message.replace("$", r"\$")):
        write(tmp_path / "app", given)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("write", WRITERS)
def test_a_broken_bundle_and_an_existing_folder_are_refused(write, experts: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(experts / "lung_classification", tmp_path / "lung_classification")
    (broken / "configs" / "metadata.json").write_text("{}")
    with pytest.raises(LoRKDError, match="does not describe an expert"):
        write(tmp_path / "app", [broken])
    write(tmp_path / "app", [experts / "lung_classification"])
    with pytest.raises(LoRKDError, match="exists already"):
        write(tmp_path / "app", [experts / "lung_classification"])
    write(tmp_path / "app", [experts / "skin_segmentation"], overwrite=True)
    assert not list(tmp_path.glob("app/model*/lung_classification"))
    with pytest.raises(LoRKDError, match="lung_classification is not replaced: it holds no"):
        write(broken, [experts / "skin_segmentation"], overwrite=True)
    assert (broken / "models").is_dir()


def test_label_refuses_two_classes_of_one_name(experts: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(experts / "lung_classification", tmp_path / "lung_classification")
    path = bundle / "configs" / "metadata.json"
    metadata = json.loads(path.read_text(encoding="utf-8"))
    metadata["network_data_format"]["outputs"]["pred"]["channel_def"]["2"] = "background"
    path.write_text(json.dumps(metadata), encoding="utf-8")
    with pytest.raises(LoRKDError, match="several classes named 'background'"):
        write_label_app(tmp_path / "app", [bundle])


@pytest.mark.parametrize("command", ["label-app", "deploy-app"])
def test_the_command_line_takes_several_experts(
    command: str, experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["lung_classification", "tumor_segmentation"]
    arguments = [command, str(tmp_path / "app"), "--experts", *(str(experts / name) for name in names)]
    monkeypatch.setattr(sys, "argv", ["lorkd", *arguments])
    cli.main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "app")
    assert sorted(p.name for p in next(tmp_path.glob("app/model*")).iterdir()) == names
