"""An expert's page says what its teacher costs, also when the expert is exported again later."""

from __future__ import annotations

import json

import pytest

from lorkd_monai.bundle import network_info, write_teacher_bundle
from lorkd_monai.bundle.export import export_experts
from lorkd_monai.bundle.facts import read_facts, resolved_facts, teacher_facts, write_facts
from lorkd_monai.bundle.formats import build_network
from lorkd_monai.checkpoints.weights import save_weights
from lorkd_monai.data import load_data_list, make_phantoms
from lorkd_monai.errors import LoRKDError
from lorkd_monai.handlers import ExpertExport
from lorkd_monai.metrics.costs import measure
from lorkd_monai.networks import LoRKDNet
from tests.small_networks import SMALL_RESNET


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    make_phantoms(folder, "classification", 2, num_images=10, image_size=16)
    return load_data_list(folder, "classification", 2)


@pytest.fixture
def teacher(data, tmp_path):
    config = {**SMALL_RESNET, "block_inplanes": [8, 8, 16, 16], "num_classes": sum(data.num_classes.values())}
    return write_teacher_bundle(
        tmp_path / "teacher", network=build_network(config), network_config=config,
        work=data.work(3, 16),
    )  # fmt: skip


def test_the_teacher_is_measured_on_the_students_image_size(teacher):
    facts = teacher_facts(teacher, 2, 16)
    config = json.loads((teacher / "configs" / "inference.json").read_text())["network_def"]
    counted = measure(build_network(config), (1, 3, 16, 16))
    assert facts["name"] == "teacher" and facts["network"] == "ResNet" and facts["latency_ms"] > 0
    for key in ("parameters", "macs", "weights_mib", "activations_mib"):
        assert facts[key] == counted[key]
    assert teacher_facts(teacher, 2, [16, 16])["macs"] == counted["macs"]


def test_what_cannot_be_measured_has_its_name_only(teacher, tmp_path, caplog):
    assert teacher_facts(None, 2, 16) == {"name": "none"}
    assert teacher_facts(tmp_path / "nowhere", 2, 16) == {"name": "nowhere"}
    assert "could not be measured" in caplog.text
    assert teacher_facts(teacher, 3, 16) == {"name": "teacher"}  # a network for pictures takes no volumes


def test_the_page_shows_expert_and_teacher_beside_each_other_also_when_exported_again(data, teacher, tmp_path):
    network = LoRKDNet(SMALL_RESNET, data.num_classes, rank=1, info=network_info(data, 3, 16))
    weights = tmp_path / "training" / "model.pt"
    weights.parent.mkdir()
    save_weights(weights, network.state_dict())
    parent = {"epochs": 7, "teacher": lambda: teacher_facts(teacher, 2, 16)}
    ExpertExport(network, weights, tmp_path / "experts", parent=parent, formats=["pt"], tasks=["ct"]).export(None)
    page = (tmp_path / "experts" / "ct_classification" / "docs" / "README.md").read_text()
    parameters = sum(p.numel() for p in network.extract("ct").parameters())
    costs = read_facts(weights)["teacher"]
    assert f"| Parameters | {parameters:,} | {costs['parameters']:,} |" in page
    assert "not given |" not in page and "* epochs: 7" in page and str(tmp_path) not in page

    (again,) = export_experts(network, tmp_path / "again", ["ct"], parent=read_facts(weights), formats=["pt"])
    assert f"{costs['parameters']:,} |" in (again / "docs" / "README.md").read_text()


def test_facts_beside_a_checkpoint(tmp_path):
    weights = tmp_path / "model.pt"
    assert read_facts(weights) == {}
    path = write_facts(weights, resolved_facts({"a": 1, "b": lambda: {"é": 2}}))
    assert path == tmp_path / "facts.json" and read_facts(weights) == {"a": 1, "b": {"é": 2}}
    for text, message in (("{", "can't be read as JSON"), ("[]", "must hold a JSON object, got a list")):
        path.write_text(text)
        with pytest.raises(LoRKDError, match=message):
            read_facts(weights)
