"""The report: complete, by itself, and honest about what is missing."""

from __future__ import annotations

import importlib.util
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from lorkd_monai.checkpoints.weights import save_weights
from lorkd_monai.cli.study import report
from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import LoRKDNet
from lorkd_monai.study.files import RunFile, write_json

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from lorkd_monai.report import figures
from lorkd_monai.report.content import Content
from lorkd_monai.report.run_source import _events
from lorkd_monai.report.study_source import confusion_matrix, spectrum_content

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "study"))
from hand_made_study import write_run


class Page(HTMLParser):
    """The addresses that a page asks for, its tags, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def study_folder(tmp_path: Path) -> Path:
    """A study made by hand: a teacher, students, a decomposition with all that a run can tell."""
    folder = tmp_path / "study"
    write_json(folder / "study.json", {"format": 1})
    for seed in (0, 1):
        write_run(folder, "teacher", seed, [[0, 0, 1, 0]] * 2, family="teacher")
        write_run(folder, "mtl", seed, [[0, 1, 1, 0]] * 2)
        run = write_run(folder, "lorkd", seed, [[0, 0, 1, 1], [0, 0, 1, 0]], family="lorkd")
        content = run.read()
        cosines = [[1.0, -0.5], [-0.5, 1.0]]
        content["gradient_conflict"] = {
            "tasks": ["a", "b"], "cosines": cosines, "norms": [1, 1], "by_layer": {"c": -0.5},
        }  # fmt: skip
        content["spectra"] = {t: {"c": {"values": [2.0, 1.0], "relative_size": 0.1}} for t in "ab"}
        content["ranks"] = {"a": 1, "b": 1}
        run.write(content, run.read_arrays())
    return folder


@pytest.mark.slow
def test_study_report_is_complete_and_alone(study_folder: Path) -> None:
    file = Path(report(str(study_folder)))
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    assert all(a.startswith(("data:image/png;base64,", "#")) for a in page.addresses)
    assert "script" not in page.tags and "link" not in page.tags and "@import" not in text and "url(" not in text
    for title in ("What was decomposed", "Comparison: full", "Accuracy against parameters", "Learning curves",
                  "Loss, term by term", "Do the tasks' gradients conflict?", "What each expert adds",
                  "Confusion matrices", "What it costs", "How it was made"):  # fmt: skip
        assert title in page.text
    assert "mean balanced accuracy over tasks of 0.875" in page.text
    assert "<b>yes</b>" in page.text and "b" not in page.tags  # class names are text, not markup


@pytest.mark.slow
def test_one_lucky_seed_is_no_headline(study_folder: Path) -> None:
    lucky = write_run(study_folder, "lorkd_lucky", 0, [[0, 0, 1, 1]] * 2, family="lorkd")
    content = lucky.read()
    content["fits"]["all tasks"]["validation"] = 0.99
    lucky.write(content, lucky.read_arrays())
    text = Page(Path(report(str(study_folder))).read_text(encoding="utf-8")).text
    assert "2 seeds: of the decompositions" in text and "most seeds lorkd has the best validation score" in text


@pytest.mark.slow
def test_budgets_are_compared_by_themselves(study_folder: Path) -> None:
    for method, family in (("lorkd_long", "lorkd"), ("mtl_long", "mtl")):
        for seed in (0, 1):
            run = write_run(study_folder, method, seed, [[0, 0, 1, 1]] * 2, family=family)
            content = run.read()
            content["settings"]["epochs"] = 30
            run.write(content, run.read_arrays())
    write_run(study_folder, "stl", 0, [[0, 0, 1, 1]] * 2, family="stl")
    text = Page(Path(report(str(study_folder))).read_text(encoding="utf-8")).text
    short, long = text.index("Setting full, 1 epochs"), text.index("Setting full, 30 epochs")
    assert short < long < text.index("What was decomposed")
    assert "mtl:" in text[short:long] and "mtl_long:" not in text[short:long]
    assert "mtl_long:" in text[long:] and "teacher:" in text[long:]
    assert ", 1 of 2 seeds" in text[short:long]  # stl has one


@pytest.mark.slow
def test_names_are_no_formulas_and_nothing_is_half_written(study_folder: Path, tmp_path: Path) -> None:
    for path in study_folder.rglob("seed*.json"):
        path.write_text(path.read_text(encoding="utf-8").replace("<b>yes</b>", r"$\\bad{ $5"), encoding="utf-8")
    target = tmp_path / "file"
    target.touch()
    with pytest.raises(LoRKDError, match="can't be written to .*file.* Name another folder by --output"):
        report(str(study_folder), str(target))
    assert target.is_file() and not (study_folder / "report").exists()
    assert "$\\bad{ $5" in Page(Path(report(str(study_folder))).read_text(encoding="utf-8")).text


@pytest.mark.slow
def test_markdown_has_its_pictures(study_folder: Path) -> None:
    folder = Path(report(str(study_folder))).parent
    text = (folder / "report.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(pictures) > 8 and len(set(pictures)) == len(pictures)
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    header = next(line for line in text.splitlines() if line.startswith("| method"))
    assert (
        text.splitlines()[text.splitlines().index(header) + 1] == "|" + "---|" * header.strip(" |").count("|") + "---|"
    )


@pytest.mark.slow
def test_segmentations_are_shown(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    write_json(folder / "study.json", {"format": 1})
    run = write_run(folder, "lorkd", 0, [[0, 0, 1, 1]] * 2, family="lorkd")
    content, arrays = run.read(), {}
    content["score"] = "dice"
    content["data"]["kind"] = "segmentation"
    content["figures"] = {t: {"dice": {"value": 0.5, "n": 4}} for t in "ab"}
    for number in (0, 1):
        arrays[f"{number}_dice"] = np.full((4, 1), 0.5)
        for rank in ("best", "median", "worst"):
            mask = np.zeros((12, 12), np.uint8)
            mask[3:8, 3:8] = 1
            arrays |= {f"{number}_{rank}_{k}": mask for k in ("label", "prediction")}
            arrays |= {f"{number}_{rank}_image": mask * 200, f"{number}_{rank}_dice": np.float64(0.5)}
    run.write(content, arrays)
    text = Path(report(str(folder))).read_text(encoding="utf-8")
    assert "Segmentations" in text and "Confusion matrices" not in text
    assert text.count('alt="a, lorkd') == 3


@pytest.mark.slow
def test_output_of_a_bundle(tmp_path: Path) -> None:
    folder = tmp_path / "output"
    (folder / "training").mkdir(parents=True)
    config = {"_target_": "DenseNet", "spatial_dims": 2, "in_channels": 1, "init_features": 4, "growth_rate": 4,
              "block_config": [1, 1]}  # fmt: skip
    info = {"kind": "classification", "spatial_dims": 2, "in_channels": 1, "image_size": 16, "tasks": {}}
    network = LoRKDNet(config, {"a": 2, "b": 3}, rank=2, info=info)
    with torch.no_grad():
        for layer in network.expert_layers.values():
            layer.lora_B[0].normal_()
    save_weights(folder / "training" / "model.pt", network.state_dict())
    text = Path(report(str(folder))).read_text(encoding="utf-8")
    assert "What each expert adds" in text and "What it costs" in text
    assert "There are no metrics on test images: run `evaluating`" in text

    figure = {"balanced_accuracy": {"value": 0.75, "low": 0.5, "high": 1.0, "n": 4}}
    write_json(folder / "figures.json", {"experts": {"a": figure, "b": figure}, "teacher": {"a": figure}})
    text = Path(report(str(folder), str(tmp_path / "elsewhere"))).read_text(encoding="utf-8")
    assert "0.750 (0.500–1.000)" in text and (tmp_path / "elsewhere" / "report.md").is_file()


def test_losses_of_a_run_go_across_its_iterations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for iteration in range(1, 7):  # three batches in each of two epochs
            for tag in ("total", "task/a", "task/b"):
                writer.add_scalar(tag, 1 / iteration, iteration)
        for epoch in (1, 2):
            writer.add_scalar("a", 0.5 * epoch, epoch)
    content = Content("run")
    _events(content, tmp_path, "training", ["a", "b"])
    monkeypatch.setattr(figures, "_png", lambda figure: figure.axes[0].get_xlabel())
    (score,) = content.validation["a"]
    assert score.epochs == [1, 2] and figures.curves([score], "dice") == "epoch"
    assert set(content.losses) == {"training: terms", "training: task loss of each task"}
    for lines in content.losses.values():
        assert all(line.epochs == list(range(1, 7)) for line in lines)
        assert figures.curves(lines, "loss") == "iteration"


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(LoRKDError, match="nothing to report in"):
        report(str(tmp_path))
    with pytest.raises(LoRKDError, match="is no folder"):
        report(str(tmp_path / "none"))
    with pytest.raises(LoRKDError, match="folder: expected a path, got 3"):
        report(3)


def test_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "jinja2" else find(name, *a))
    with pytest.raises(LoRKDError, match=r"needs jinja2: pip install 'lorkd-monai\[report\]'"):
        report(str(tmp_path))


def test_a_broken_run_is_named(study_folder: Path) -> None:
    run = RunFile(study_folder, "full", "mtl", 0)
    run.json.write_text("{")
    with pytest.raises(LoRKDError, match="seed0.json can't be read as JSON"):
        report(str(study_folder))


def test_confusion_by_hand() -> None:
    probability = np.eye(3)[[0, 0, 2, 1]]
    assert confusion_matrix(probability, np.array([0, 1, 2, 2])).tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 1]]


def test_directions_by_hand() -> None:
    """Squares 9 and 1: the first holds exactly 90 %; squares 4, 4, 1: the first two hold less than 90 %."""
    spectra = {"a": {"x": {"values": [3.0, 1.0], "relative_size": 0.2}, "y": {"values": [], "relative_size": 0.0}}}
    matrices, curves = spectrum_content(spectra)
    assert matrices[1].values[:, 0].tolist() == [1, 0] and matrices[0].values[:, 0].tolist() == [0.2, 0.0]
    assert [c.label for c in curves["a"]] == ["x"]
    spectra = {"a": {"x": {"values": [2.0, 2.0, 1.0], "relative_size": 0.2}}}
    assert spectrum_content(spectra)[0][1].values.tolist() == [[3]]
