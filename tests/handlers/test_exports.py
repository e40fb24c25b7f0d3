"""Experts and teachers: what exists is refused before training, what a killed export left is not."""

from __future__ import annotations

import json

import pytest
import torch
from ignite.engine import Engine

from lorkd_monai.bundle import network_info
from lorkd_monai.checkpoints.weights import load_weights, save_weights
from lorkd_monai.data import load_data_list, make_phantoms
from lorkd_monai.errors import LoRKDError
from lorkd_monai.handlers import ExpertExport, TeacherExport
from lorkd_monai.networks import LoRKDNet, TaskChannels
from tests.small_networks import SMALL_RESNET


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    make_phantoms(folder, "classification", 2, num_images=10, image_size=16)
    return load_data_list(folder, "classification", 2)


@pytest.fixture(scope="module")
def network(data):
    torch.manual_seed(0)
    return LoRKDNet(SMALL_RESNET, data.num_classes, rank=1, info=network_info(data, 3, 16))


def trainer(handler, steps):
    engine = Engine(lambda engine, batch: steps.append(batch))
    handler.attach(engine)
    return engine


def test_experts_are_written_from_the_best_weights_with_their_figures(data, network, tmp_path):
    best = {key: value.clone() for key, value in network.state_dict().items()}
    key = next(key for key, value in best.items() if value.is_floating_point())
    best[key] *= 2
    save_weights(tmp_path / "model.pt", best)
    figures = {"ct": {"balanced_accuracy": {"value": 0.625, "low": 0.5, "high": 0.75, "n": 40}}}
    handler = ExpertExport(
        network, tmp_path / "model.pt", tmp_path / "experts", lambda net: figures, {"epochs": 7}, formats=["pt"]
    )
    trainer(handler, []).run([0])
    names = sorted(path.name for path in (tmp_path / "experts").iterdir())
    assert names == sorted(f"{task}_classification" for task in data.tasks)
    network.load_state_dict(best)
    written = load_weights(tmp_path / "experts" / "ct_classification" / "models" / "model.pt")
    expected = network.extract("ct").state_dict()
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in expected)
    readme = (tmp_path / "experts" / "ct_classification" / "docs" / "README.md").read_text()
    assert "0.625" in readme


def test_existing_experts_are_refused_before_any_step(network, tmp_path):
    (tmp_path / "experts" / "mr_classification").mkdir(parents=True)
    steps = []
    handler = ExpertExport(network, None, tmp_path / "experts")
    with pytest.raises(LoRKDError, match="already holds the experts mr_classification: .*--overwrite True"):
        trainer(handler, steps).run([0])
    assert steps == []
    assert list((tmp_path / "experts").rglob("*")) == [tmp_path / "experts" / "mr_classification"]


def test_overwrite_and_foreign_folders(network, tmp_path):
    foreign = tmp_path / "experts" / "something_else"
    foreign.mkdir(parents=True)
    old = tmp_path / "experts" / "mr_classification" / "old.txt"
    old.parent.mkdir()
    old.touch()
    export = ExpertExport(network, None, tmp_path / "experts", overwrite=True, formats=["pt"])
    with pytest.raises(LoRKDError, match="mr_classification is not replaced: it holds no"):
        export.check(trainer(export, []))
    old.unlink()
    trainer(export, []).run([0])
    old.touch()
    trainer(export, []).run([0])
    assert foreign.exists() and not old.exists()


def test_unknown_format_is_refused_at_once(network, tmp_path):
    with pytest.raises(LoRKDError, match="formats must hold 'pt'"):
        ExpertExport(network, None, tmp_path, formats=["exe"])


def test_onnx_without_its_package_is_said_once_and_before_the_training(network, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("lorkd_monai.bundle.writer.onnx_is_installed", lambda: False)
    with pytest.raises(LoRKDError, match=r"pip install 'lorkd-monai\[onnx\]'"):
        ExpertExport(network, None, tmp_path, formats=["pt", "onnx"])
    assert not caplog.records
    export = ExpertExport(network, None, tmp_path / "experts")
    assert [record.getMessage() for record in caplog.records if "onnx" in record.getMessage()] == [
        "model.onnx is left out: the package onnx is not installed (pip install 'lorkd-monai[onnx]')"
    ]
    caplog.clear()
    trainer(export, []).run([0])
    assert "model.onnx" not in caplog.text
    for expert in (tmp_path / "experts").iterdir():
        assert sorted(path.name for path in (expert / "models").iterdir()) == [
            "model.pt", "model.safetensors", "model.ts"
        ]  # fmt: skip


def test_killed_export_is_written_again(network, tmp_path, monkeypatch):
    import lorkd_monai.bundle.export as export

    folder = tmp_path / "experts"
    write = export.write_expert_bundle

    def killed(target, **options):
        if target.name == "mr_classification":
            raise KeyboardInterrupt
        return write(target, **options)

    monkeypatch.setattr(export, "write_expert_bundle", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer(ExpertExport(network, None, folder, formats=["pt"]), []).run([0])
    assert (folder / "ct_classification").exists()
    monkeypatch.setattr(export, "write_expert_bundle", write)
    trainer(ExpertExport(network, None, folder, formats=["pt"]), []).run([0])
    assert len(list(folder.iterdir())) == 4
    with pytest.raises(LoRKDError, match="already holds the experts"):
        trainer(ExpertExport(network, None, folder, formats=["pt"]), []).run([0])


def test_teacher_bundle(data, tmp_path):
    network = TaskChannels.build(SMALL_RESNET, data.num_classes)
    save_weights(tmp_path / "model.pt", network.state_dict())
    figures = {"ct": {"accuracy": {"value": 0.75, "n": 4}}}
    folder = tmp_path / "teacher"
    handler = TeacherExport(network, tmp_path / "model.pt", folder, data, 3, 16, lambda net: figures)
    trainer(handler, []).run([0])
    channels = json.loads((folder / "configs" / "metadata.json").read_text())["network_data_format"]["outputs"]["pred"]
    assert list(channels["channel_def"].values())[:2] == ["ct: one organ", "ct: two organs"]
    assert load_weights(folder / "models" / "model.pt").keys() == network.network.state_dict().keys()
    steps = []
    with pytest.raises(LoRKDError, match="exists already: it is this output folder's teacher.*--overwrite True"):
        trainer(TeacherExport(network, tmp_path / "model.pt", folder, data, 3, 16), steps).run([0])
    assert steps == []
