"""`lorkd renorm`: batch-norm statistics of an expert's own images; and `lorkd suggest-ranks`."""

from __future__ import annotations

import json

import pytest
import torch

from lorkd_monai.bundle import check_bundle, network_info
from lorkd_monai.checkpoints.weights import load_weights, save_weights
from lorkd_monai.cli import commands as cli
from lorkd_monai.data import TaskDataset, load_data_list, make_phantoms
from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import LoRKDNet
from lorkd_monai.workflows.renorm import renorm_experts
from tests.small_networks import SMALL_RESNET

RESNET = {**SMALL_RESNET, "conv1_t_stride": 1}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    make_phantoms(folder, "classification", 2, num_images=20, image_size=24)
    return folder


@pytest.fixture(scope="module")
def checkpoint(images, tmp_path_factory):
    torch.manual_seed(0)
    data = load_data_list(images, "classification", 2)
    network = LoRKDNet(RESNET, data.num_classes, rank=2, info=network_info(data, 3, 24))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    path = tmp_path_factory.mktemp("decomposition") / "training" / "model.pt"
    path.parent.mkdir()
    save_weights(path, network.state_dict())
    return path


def test_statistics_are_those_of_the_task_s_images(images, checkpoint, tmp_path):
    written, table = renorm_experts(checkpoint, images, tmp_path / "out", ["mr", "ct"], batch_size=12, formats=["pt"])
    assert [path.name for path in written] == ["mr_classification", "ct_classification"]
    assert "| balanced_accuracy before | after |" in table
    data = load_data_list(images, "classification", 2)
    for path in written:
        assert check_bundle(path, thorough=False) == []
        state = load_weights(path / "models" / "model.pt")
        task = path.name.split("_")[0]
        items = TaskDataset(data, "training", 3, 24, progress=False)
        own = torch.stack([items[i]["image"] for i, item in enumerate(items.items) if item["task"] == task])
        assert len(own) == 12
        # The first norm sees the first convolution of all twelve images, in one batch.
        after_first = torch.nn.functional.conv2d(own, state["conv1.weight"], padding=1)
        torch.testing.assert_close(state["bn1.running_mean"], after_first.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(state["bn1.running_var"], after_first.var((0, 2, 3)), atol=1e-4, rtol=1e-3)
        metadata = json.loads((path / "configs" / "metadata.json").read_text())
        assert f"{metadata['eval_metrics']['balanced_accuracy']['value']:.3f}" in table
        assert "re-estimated on the task's own images" in (path / "docs" / "README.md").read_text()


def test_refusals(images, checkpoint, tmp_path):
    with pytest.raises(LoRKDError, match="unknown task 'liver'"):
        renorm_experts(checkpoint, images, tmp_path / "out", ["liver"])
    (tmp_path / "there" / "mr_classification").mkdir(parents=True)
    with pytest.raises(LoRKDError, match="already holds the experts mr_classification"):
        renorm_experts(checkpoint, images, tmp_path / "there", ["mr"])
    file = images / "dataset.json"
    content = json.loads(file.read_text())
    (images / "others.json").write_text(json.dumps(content | {"tasks": {**content["tasks"], "lung": {}}}))
    with pytest.raises(LoRKDError, match="lung"):
        renorm_experts(checkpoint, images / "others.json", tmp_path / "out")
    del content["tasks"]["mr"]
    (images / "fewer.json").write_text(json.dumps(content))
    with pytest.raises(LoRKDError, match="has no task 'mr' with 2 classes"):
        renorm_experts(checkpoint, images / "fewer.json", tmp_path / "out")


def test_a_network_without_batch_norms_is_refused(images, tmp_path):
    data = load_data_list(images, "classification", 2)
    config = {"_target_": "DenseNet", "spatial_dims": 2, "in_channels": 3, "init_features": 4, "growth_rate": 2,
              "block_config": [1, 1], "norm": "instance"}  # fmt: skip
    network = LoRKDNet(config, data.num_classes, rank=2, info=network_info(data, 3, 24))
    save_weights(tmp_path / "model.pt", network.state_dict())
    with pytest.raises(LoRKDError, match="no batch norm that keeps statistics"):
        renorm_experts(tmp_path / "model.pt", images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def run_cli(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["lorkd", *map(str, arguments)])
    cli.main()
    return capsys.readouterr().out


def test_renorm_on_the_command_line(images, checkpoint, tmp_path, monkeypatch, capsys):
    out = run_cli(
        monkeypatch, capsys, "renorm", checkpoint.parent.parent, images, tmp_path / "out", "--tasks", "mr",
        "--formats", "pt",
    )  # fmt: skip
    assert str(tmp_path / "out" / "mr_classification") in out
    assert "| mr |" in out


def test_suggest_ranks_on_the_command_line(images, checkpoint, tmp_path, monkeypatch, capsys):
    renorm_experts(checkpoint, images, tmp_path / "out", formats=["pt"])
    paths = {}
    for task in ("ct", "ultrasound", "mr", "cells"):
        paths[task] = tmp_path / "out" / f"{task}_classification"
    # As after a fine-tuning: one task's weights move in many directions, the others' as the expert moved them.
    state = load_weights(paths["mr"] / "models" / "model.pt")
    state = {k: v + 0.1 * torch.randn_like(v) if k.endswith("weight") else v for k, v in state.items()}
    paths["mr"] = tmp_path / "mr.pt"
    save_weights(paths["mr"], state)
    tuned = "{" + ", ".join(f"{task}: {path}" for task, path in paths.items()) + "}"
    out = run_cli(monkeypatch, capsys, "suggest-ranks", checkpoint, tuned)
    ranks = dict(part.split(": ") for part in out.strip().splitlines()[-1].split("{")[1].rstrip("}'").split(", "))
    assert set(ranks) == set(paths)
    rows = json.loads(run_cli(monkeypatch, capsys, "suggest-ranks", checkpoint, tuned, "--as_json"))
    assert sum(row["parameters"] for row in rows) <= sum(row["equal_parameters"] for row in rows)
    assert {row["task"]: str(row["rank"]) for row in rows} == ranks
    # Experts of rank 2 are held in full by rank 2; what moved in all directions is not.
    energy = {row["task"]: row["equal_energy"] for row in rows}
    assert all(energy[task] > 0.999 for task in paths if task != "mr")
    assert energy["mr"] < 0.99
    with pytest.raises(LoRKDError, match="{task: path, other: path}"):
        cli.suggest_ranks(str(checkpoint), "mr.pt")
    with pytest.raises(LoRKDError, match="tuned holds the tasks mr"):
        cli.suggest_ranks(str(checkpoint), {"mr": str(paths["mr"])})
