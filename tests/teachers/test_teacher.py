"""The teacher: selecting each sample's channels, matching classes by name, and loading from bundles."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from monai.networks.nets import BasicUNet, DynUNet, ViT, resnet10
from torch import nn

from lorkd_monai.checkpoints.weights import save_weights
from lorkd_monai.errors import LoRKDError
from lorkd_monai.teachers.bundle import load_teacher, teacher_from_checkpoint
from lorkd_monai.teachers.channels import channels_by_name
from lorkd_monai.teachers.teacher import Teacher

TASKS = {"a": 2, "b": 3}


def net(out=5, channels=1):
    return resnet10(spatial_dims=2, n_input_channels=channels, num_classes=out, widen_factor=0.125)


def test_each_sample_gets_its_own_channels():
    network = net().double()
    teacher = Teacher(network, {"a": [0, 1], "b": [4, 2, 3]}, TASKS)
    x = torch.rand(3, 1, 32, 32).double()
    y, plain = teacher(x, torch.tensor([1, 0, 1])), network(x)
    assert y.shape == (3, 3)
    assert torch.equal(y[[0, 2]], plain[[0, 2]][:, [4, 2, 3]])
    assert torch.equal(y[1, :2], plain[1, :2]) and y[1, 2] == -math.inf
    assert torch.equal(teacher(x, 0), teacher(x, torch.tensor([0, 0, 0])))


def test_frozen_and_in_evaluation_mode():
    teacher = Teacher(net().train(), None, {"a": 5})
    teacher.train()
    nn.Sequential(teacher).train()
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    with torch.enable_grad():
        y = teacher(torch.rand(2, 1, 32, 32), 0)
    assert not y.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_tasks_without_logits_are_told_and_nan():
    teacher = Teacher(net(), {"b": [0, 1, 2]}, TASKS)
    task = torch.tensor([0, 1])
    assert teacher.has_logits(task).tolist() == [False, True]
    y = teacher(torch.rand(2, 1, 32, 32), task)
    assert y[0].isnan().all() and y[1].isfinite().all()


def test_grouped_background_keeps_the_probabilities():
    network = BasicUNet(2, 1, 4, features=(2, 2, 2, 2, 2, 2)).double()
    teacher = Teacher(network, {"spleen": [(0, 2, 3), 1]}, {"spleen": 2})
    x = torch.rand(2, 1, 32, 32).double()
    p = teacher(x, 0).softmax(1)
    assert torch.allclose(p[:, 1], network(x).softmax(1)[:, 1], atol=1e-12)


def test_sigmoid_teacher_leaves_unknown_classes_out():
    teacher = Teacher(net(), {"a": [None, 3]}, {"a": 2}, activation="sigmoid")
    y = teacher(torch.rand(2, 1, 32, 32), 0)
    assert (y[:, 0] == -math.inf).all() and y[:, 1].isfinite().all()


@pytest.mark.parametrize(("wants", "came"), [(1, 3), (3, 1), (2, 2)])
def test_image_channels_are_adapted(wants, came):
    network = net(channels=wants).double()
    teacher = Teacher(network, None, {"a": 5})
    x = torch.rand(2, came, 32, 32).double()
    given = x if wants == came else x.mean(1, keepdim=True) if wants == 1 else x.repeat(1, wants, 1, 1)
    assert torch.equal(teacher(x, 0), network(given))


def test_image_channels_that_do_not_fit():
    with pytest.raises(LoRKDError, match="takes images of 3 channels, got 2"):
        Teacher(net(channels=3), None, {"a": 5})(torch.rand(1, 2, 32, 32), 0)


def test_features():
    network = net().double()
    teacher = Teacher(network, None, {"a": 5})
    x = torch.rand(3, 1, 32, 32).double()
    y, features = teacher(x, 0, return_features=True)
    assert torch.allclose(network.fc(features), y)
    assert torch.equal(teacher.features_of(x), features)


@pytest.mark.parametrize(
    ("network", "size", "width"),
    [
        (ViT(1, 16, 8, hidden_size=12, mlp_dim=8, num_layers=1, num_heads=2, classification=True, num_classes=5,
             spatial_dims=2), 16, 12),
        (DynUNet(2, 1, 5, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 6, 8], deep_supervision=True), 16, 4),
    ],
)  # fmt: skip
def test_features_and_outputs_of_other_networks(network, size, width):
    teacher = Teacher(network, None, {"a": 5})
    y, features = teacher(torch.rand(2, 1, size, size), 0, return_features=True)
    assert y.shape[:2] == (2, 5) and features.shape == (2, width)


def test_a_second_teacher_on_one_network_adds_no_hook():
    network = resnet10(spatial_dims=2, n_input_channels=1, num_classes=2)
    teachers = [Teacher(network, None, {"a": 2}) for _ in range(3)]
    assert sum(len(m._forward_pre_hooks) for m in network.modules()) == 1
    x = torch.rand(2, 1, 32, 32)
    assert all(torch.equal(t(x, 0, return_features=True)[1], teachers[0].features_of(x)) for t in teachers)


def test_features_of_a_network_whose_head_is_not_found():
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5))
    x = torch.rand(2, 1, 4, 4)
    teacher = Teacher(network, None, {"a": 5})
    assert teacher(x, 0).shape == (2, 5)
    with pytest.raises(LoRKDError, match="could not be found"):
        teacher.features_of(x)
    assert Teacher(network, None, {"a": 5}, head="1").features_of(x).shape == (2, 16)


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ({"c": [0]}, "unknown task 'c'"),
        ({"a": [0]}, "expected one for each of its 2 classes"),
        ({"a": [0, 0]}, "different numbers"),
        ({"a": [0, -1]}, "different numbers"),
        ({"a": [None, 1]}, "must have all its classes"),
        ({"a": [[0, 1], 1]}, "different numbers"),
    ],
)
def test_wrong_channels(channels, message):
    with pytest.raises(LoRKDError, match=message):
        Teacher(net(), channels, TASKS)


def test_wrong_calls():
    with pytest.raises(LoRKDError, match="activation"):
        Teacher(net(), None, {"a": 5}, activation="relu")
    with pytest.raises(LoRKDError, match="num_classes"):
        Teacher(net(), None, {})
    teacher = Teacher(net(), {"a": [0, 7], "b": None}, TASKS)
    x = torch.rand(2, 1, 32, 32)
    with pytest.raises(LoRKDError, match=r"output has shape \(2, 5\); expected 2 × at least 8"):
        teacher(x, 0)
    with pytest.raises(LoRKDError, match="serves tasks 0 to 1"):
        teacher(x, 2)
    with pytest.raises(LoRKDError, match="3 entries for a batch of 2"):
        teacher(x, [0, 0, 1])


# ---------------------------------------------------------------------- classes by name


def test_names_with_the_task_come_first():
    names = {"0": "a: benign", "1": "a: malignant", "2": "benign", "3": "b: malignant", "4": "b: Benign"}
    labels = {"a": {0: "malignant", 1: "benign"}, "b": {0: "benign", 1: "malignant"}}
    assert channels_by_name(names, labels) == {"a": [1, 0], "b": [4, 3]}


def test_names_are_compared_without_case_and_underscores():
    names = {0: "Background", 1: "Left_Kidney", 2: "right kidney", 3: "liver"}
    labels = {"kidneys": {0: "background", 1: "left kidney", 2: "Right_Kidney"}, "brain": {0: "background", 1: "brain"}}
    assert channels_by_name(names, labels) == {"kidneys": [(0, 3), 1, 2], "brain": None}
    assert channels_by_name(names, labels, "sigmoid")["kidneys"] == [None, 1, 2]


def test_background_of_the_same_classes_is_the_teachers_own():
    assert channels_by_name({0: "background", 1: "spleen"}, {"s": {0: "background", 1: "spleen"}}) == {"s": [0, 1]}


def test_background_of_the_task_itself():
    names = {0: "s: background", 1: "s: spleen", 2: "h: background", 3: "h: heart"}
    labels = {"s": {0: "background", 1: "spleen"}, "h": {0: "background", 1: "heart"}}
    assert channels_by_name(names, labels) == {"s": [0, 1], "h": [2, 3]}


def test_what_could_not_be_matched_is_listed():
    with pytest.raises(
        LoRKDError, match=r"knows some classes.*organs: 'tumour' is no class.*Its classes are: background"
    ):
        channels_by_name({0: "background", 1: "liver"}, {"organs": {0: "background", 1: "liver", 2: "tumour"}})
    with pytest.raises(LoRKDError, match=r"no class of any task.*background, liver.*heart: background, heart"):
        channels_by_name({0: "background", 1: "liver"}, {"heart": {0: "background", 1: "heart"}})
    with pytest.raises(LoRKDError, match="'liver' is the name of several channels"):
        channels_by_name({0: "Liver", 1: "LIVER"}, {"t": {0: "liver"}})


# ---------------------------------------------------------------------- bundles


def write_bundle(folder, *, config=None, names=("background", "spleen", "liver"), network_id="network_def", post=()):
    network_config = {"_target_": "BasicUNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 3,
                      "features": [2, 2, 2, 2, 2, 2]}  # fmt: skip
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    if config is None:
        config = {network_id: network_config, "postprocessing": {"_target_": "Compose", "transforms": list(post)}}
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    outputs = {"pred": {"channel_def": {str(i): n for i, n in enumerate(names)}}}
    inputs = {"image": {"num_channels": 1}}
    (folder / "configs" / "metadata.json").write_text(
        json.dumps({"network_data_format": {"inputs": inputs, "outputs": outputs}})
    )
    network = BasicUNet(2, 1, 3, features=(2, 2, 2, 2, 2, 2))
    save_weights(folder / "models" / "model.pt", network.state_dict())
    return network.eval()


SPLEEN = {"spleen": {0: "background", 1: "Spleen"}}


@pytest.mark.parametrize("network_id", ["network_def", "network", "net"])
def test_load_teacher(tmp_path, network_id):
    network = write_bundle(tmp_path / "t", network_id=network_id)
    teacher = load_teacher(tmp_path / "t", {"spleen": SimpleNamespace(labels=SPLEEN["spleen"])})
    assert teacher.channels == {"spleen": [(0, 2), 1]} and teacher.in_channels == 1
    x = torch.rand(1, 1, 32, 32)
    assert torch.equal(teacher(x, 0)[:, 1], network(x)[:, 1])


def test_load_teacher_follows_references_and_yaml(tmp_path):
    write_bundle(tmp_path / "t")
    (tmp_path / "t" / "configs" / "inference.json").unlink()
    (tmp_path / "t" / "configs" / "inference.yaml").write_text(
        "width: 2\nnetwork: '$@net.to(\"cpu\")'\n"
        "net: {_target_: BasicUNet, spatial_dims: 2, in_channels: 1, out_channels: 3, features: '$[@width] * 6'}\n"
    )
    assert load_teacher(tmp_path / "t", SPLEEN).has_logits(0).tolist() == [True]


def test_load_sigmoid_teacher(tmp_path):
    write_bundle(tmp_path / "t", post=[{"_target_": "Activationsd", "keys": "pred", "sigmoid": True}])
    teacher = load_teacher(tmp_path / "t", SPLEEN)
    assert teacher.activation == "sigmoid" and teacher.channels == {"spleen": [None, 1]}
    assert load_teacher(tmp_path / "t", SPLEEN, activation="softmax").activation == "softmax"


def test_load_teacher_with_channels_given(tmp_path):
    write_bundle(tmp_path / "t", names=())
    with pytest.raises(LoRKDError, match="does not name the teacher's classes"):
        load_teacher(tmp_path / "t", SPLEEN)
    assert load_teacher(tmp_path / "t", SPLEEN, channels={"spleen": [0, 1]}).channels == {"spleen": [0, 1]}


def test_load_teacher_errors(tmp_path):
    with pytest.raises(LoRKDError, match="no such folder"):
        load_teacher(tmp_path / "no", SPLEEN)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoRKDError, match="is no MONAI bundle"):
        load_teacher(tmp_path / "empty", SPLEEN)
    write_bundle(tmp_path / "a", config={"inferer": 1})
    with pytest.raises(LoRKDError, match="defines no network.*network_def"):
        load_teacher(tmp_path / "a", SPLEEN)
    write_bundle(tmp_path / "b", config={"network_def": {"_target_": "BasicUNet", "surprise": 1}})
    with pytest.raises(LoRKDError, match="could not be built.*surprise"):
        load_teacher(tmp_path / "b", SPLEEN)
    write_bundle(tmp_path / "c", config={"network_def": 3})
    with pytest.raises(LoRKDError, match="gives a int"):
        load_teacher(tmp_path / "c", SPLEEN)
    write_bundle(tmp_path / "d")
    save_weights(tmp_path / "d" / "models" / "model.pt", nn.Linear(2, 2).state_dict())
    with pytest.raises(LoRKDError, match=r"does not fit the network BasicUNet.*missing \(conv_0.*unknown \(weight"):
        load_teacher(tmp_path / "d", SPLEEN)
    (tmp_path / "d" / "models" / "model.pt").unlink()
    with pytest.raises(LoRKDError, match="has no weights"):
        load_teacher(tmp_path / "d", SPLEEN)
    write_bundle(tmp_path / "e")
    with pytest.raises(LoRKDError, match="no class of any task"):
        load_teacher(tmp_path / "e", {"brain": {0: "background", 1: "tumour"}})
    (tmp_path / "e" / "configs" / "inference.json").write_text("{")
    with pytest.raises(LoRKDError, match="can't be read"):
        load_teacher(tmp_path / "e", SPLEEN)


def test_teacher_from_checkpoint(tmp_path):
    config = {"_target_": "monai.networks.nets.resnet10", "spatial_dims": 2, "n_input_channels": 1, "num_classes": 5,
              "widen_factor": 0.125}  # fmt: skip
    network = net().eval()
    save_weights(tmp_path / "t.pt", network.state_dict())
    labels = {"a": {0: "x", 1: "y"}}
    teacher = teacher_from_checkpoint(tmp_path / "t.pt", config, ["p", "a: x", "y", "q", "r"], labels)
    x = torch.rand(2, 1, 32, 32)
    assert torch.equal(teacher(x, 0), network(x)[:, 1:3])
    with pytest.raises(LoRKDError, match="classes are not known"):
        teacher_from_checkpoint(tmp_path / "t.pt", config, None, labels)
    with pytest.raises(LoRKDError, match="does not fit"):
        teacher_from_checkpoint(tmp_path / "t.pt", {**config, "num_classes": 4}, ["a: x", "y"], labels)
