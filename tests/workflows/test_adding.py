"""New tasks leave everything that a decomposition held as it was."""

import dataclasses

import pytest
import torch

from lorkd_monai.bundle import network_info
from lorkd_monai.checkpoints.weights import load_decomposition, save_weights
from lorkd_monai.data import TaskDataset, TaskSampler, load_data_list, make_phantoms
from lorkd_monai.engines import DecompositionTrainer, train_loader
from lorkd_monai.errors import LoRKDError
from lorkd_monai.losses import LoRKDLoss
from lorkd_monai.networks import LoRKDNet
from lorkd_monai.workflows.adding import (
    added_tasks,
    network_with_new_tasks,
    network_without_task,
    new_tasks_of,
    trained_info,
    what_is_added,
)
from tests.small_networks import SMALL_RESNET


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    make_phantoms(folder, "classification", 2, num_images=16, image_size=24)
    return load_data_list(folder, "classification", 2)


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory):
    first = dataclasses.replace(data, tasks={n: t for n, t in data.tasks.items() if n in ("ct", "ultrasound")})
    net = LoRKDNet(SMALL_RESNET, first.num_classes, rank=2, info=network_info(first, 3, 24))
    for layer in net.expert_layers.values():
        for b in layer.lora_B:
            torch.nn.init.normal_(b, std=0.1)
    file = tmp_path_factory.mktemp("run") / "model.pt"
    save_weights(file, net.state_dict())
    return file


@pytest.mark.parametrize("norm", ["shared", "task"])
def test_training_new_tasks_changes_nothing_of_the_old_ones(data, checkpoint, tmp_path, norm):
    if norm == "task":
        net = load_decomposition(checkpoint)
        other = LoRKDNet(SMALL_RESNET, net.num_classes, rank=2, norm="task", info=net.info)
        checkpoint = tmp_path / "task_norms.pt"
        save_weights(checkpoint, other.state_dict())
    before = load_decomposition(checkpoint).eval()
    net = network_with_new_tasks(checkpoint, data, rank={"mr": 3, "cells": 1}, in_channels=3, image_size=24)
    assert net.tasks == ["ct", "ultrasound", "mr", "cells"]
    assert net.spec()["rank"] == {"ct": 2, "ultrasound": 2, "mr": 3, "cells": 1}
    view = new_tasks_of(data, net)
    assert {item["task"] for item in view.training} == {"mr", "cells"}
    dataset = TaskDataset(view, "training", 3, 24)
    assert set(dataset.task_of_item) == {2, 3}
    new = {k: v.clone() for k, v in net.expert_state_dict("mr").items()}
    trained = [p for p in net.parameters() if p.requires_grad]
    DecompositionTrainer(
        "cpu", 2, train_loader(dataset, TaskSampler(dataset.task_of_item), 8), net,
        torch.optim.AdamW(trained, lr=0.01), LoRKDLoss("ce", transfer_weight=0, tasks=net.num_classes),
    ).run()  # fmt: skip
    net.eval()
    assert any(not torch.equal(new[k], v) for k, v in net.expert_state_dict("mr").items())
    x = torch.rand(4, 3, 24, 24)
    for task in ("ct", "ultrasound"):
        with torch.no_grad():
            assert torch.equal(net(x, task)[:, :2], before(x, task)[:, :2])
            assert torch.equal(net.extract(task)(x), before.extract(task)(x))
        for key, tensor in before.extract(task).state_dict().items():
            assert torch.equal(net.extract(task).state_dict()[key], tensor), key
    save_weights(tmp_path / "more.pt", net.state_dict())
    again = load_decomposition(tmp_path / "more.pt").eval()
    with torch.no_grad():
        assert torch.equal(again(x, "cells"), net(x, "cells"))


def test_nothing_new_and_other_images_are_refused(data, checkpoint):
    known = dataclasses.replace(data, tasks={"ct": data.tasks["ct"]})
    with pytest.raises(LoRKDError, match="nothing to add: .* knows all tasks"):
        network_with_new_tasks(checkpoint, known)
    with pytest.raises(LoRKDError, match="image_size is 32, but the decomposition .* was made for 24"):
        network_with_new_tasks(checkpoint, data, image_size=32)
    with pytest.raises(LoRKDError, match="kind is 'segmentation'"):
        network_with_new_tasks(checkpoint, dataclasses.replace(data, kind="segmentation"))


def test_names_are_checked(data, checkpoint):
    def add(*names, **options):
        return network_with_new_tasks(checkpoint, data, new_tasks=list(names), **options)

    with pytest.raises(LoRKDError, match="task 'ct' exists already in .*: give the new one .* or say --replace"):
        add("mr", "ct")
    with pytest.raises(LoRKDError, match="has no task 'spine'; its tasks are"):
        add("spine")
    with pytest.raises(LoRKDError, match="new_tasks is empty"):
        add()
    with pytest.raises(LoRKDError, match="ct, ultrasound are all tasks of"):
        add("ct", "ultrasound", replace=True)
    with pytest.raises(LoRKDError, match="replace: name the tasks"):
        network_with_new_tasks(checkpoint, data, replace=True)
    empty = dataclasses.replace(data, training=[i for i in data.training if i["task"] != "mr"])
    with pytest.raises(LoRKDError, match="task 'mr' has no training images"):
        network_with_new_tasks(checkpoint, empty, new_tasks=["mr"])
    assert added_tasks(add("mr", "mr")) == ["mr"]


def test_replacing_keeps_the_rank_and_the_others(data, checkpoint):
    before = load_decomposition(checkpoint).eval()
    net = network_with_new_tasks(checkpoint, data, new_tasks=["ct", "mr"], rank={"mr": 5}, replace=True).eval()
    assert net.tasks == ["ultrasound", "ct", "mr"]
    assert net.spec()["rank"] == {"ultrasound": 2, "ct": 2, "mr": 5}
    assert [task["index"] for task in net.info["tasks"].values()] == [0, 1, 2]
    assert added_tasks(net) == ["ct", "mr"]
    for key, tensor in before.expert_state_dict("ultrasound").items():
        assert torch.equal(net.expert_state_dict("ultrasound")[key], tensor)
    assert all(not v.any() for k, v in net.expert_state_dict("ct").items() if k.endswith("lora_B"))
    x = torch.rand(2, 3, 24, 24)
    assert torch.equal(net.extract("ultrasound")(x), before.extract("ultrasound")(x))


def test_what_a_run_works_on(data, checkpoint):
    net = network_with_new_tasks(checkpoint, data, new_tasks=["mr"])
    own = new_tasks_of(data, net)
    assert list(own.tasks) == net.tasks == ["ct", "ultrasound", "mr"]
    assert {item["task"] for item in own.training + own.validation} == {"mr"}
    assert {item["task"] for item in own.test} == {"ct", "ultrasound", "mr"}
    other = dataclasses.replace(data.tasks["ct"], labels={0: "x", 1: "y"})
    with pytest.raises(LoRKDError, match="data list .* does not mean.*classes was .*, now .'x', 'y'. .task 'ct'."):
        new_tasks_of(dataclasses.replace(data, tasks={**data.tasks, "ct": other}), net)
    again = network_with_new_tasks(checkpoint, data, new_tasks=["mr"])
    assert what_is_added(again) == what_is_added(net)
    assert what_is_added(net)["new_tasks"] == {"mr": 2}


def test_a_backbone_is_given_where_the_checkpoint_names_none(data, checkpoint, tmp_path):
    first = load_decomposition(checkpoint)
    plain = first.extract("ct")
    net = LoRKDNet(plain, first.num_classes, rank=2, info=first.info)  # made of an object: no config in the checkpoint
    save_weights(tmp_path / "net.pt", net.state_dict())
    with pytest.raises(LoRKDError, match="was made from a network object"):
        network_with_new_tasks(tmp_path / "net.pt", data, new_tasks=["mr"])
    more = network_with_new_tasks(tmp_path / "net.pt", data, new_tasks=["mr"], backbone=SMALL_RESNET)
    assert more.tasks == ["ct", "ultrasound", "mr"]


def test_removing_a_task(data, checkpoint, tmp_path):
    before = load_decomposition(checkpoint).eval()
    net = network_without_task(checkpoint, "ct").eval()
    assert net.tasks == list(net.info["tasks"]) == ["ultrasound"]
    assert net.info["tasks"]["ultrasound"]["index"] == 0
    x = torch.rand(2, 3, 24, 24)
    assert torch.equal(net.extract("ultrasound")(x), before.extract("ultrasound")(x))
    save_weights(tmp_path / "less.pt", net.state_dict())
    with pytest.raises(LoRKDError, match="task 'ultrasound' is the last one"):
        network_without_task(tmp_path / "less.pt", "ultrasound")
    with pytest.raises(LoRKDError, match="unknown task 'spine'"):
        network_without_task(checkpoint, "spine")


def test_what_is_no_trained_decomposition(data, tmp_path):
    with pytest.raises(LoRKDError, match="no trained decomposition at .*: run `training` with the same --output_dir"):
        trained_info(tmp_path / "model.pt")
    save_weights(tmp_path / "plain.pt", {"weight": torch.zeros(2)})
    with pytest.raises(LoRKDError, match="holds no decomposition"):
        trained_info(tmp_path / "plain.pt")
    save_weights(tmp_path / "bare.pt", LoRKDNet(SMALL_RESNET, {"a": 2}).state_dict())
    with pytest.raises(LoRKDError, match="does not say what its tasks are"):
        network_with_new_tasks(tmp_path / "bare.pt", data)
