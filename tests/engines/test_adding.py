"""New tasks leave everything that a decomposition held as it was."""

import dataclasses

import pytest
import torch

from lorkd_monai.bundle import network_info
from lorkd_monai.data import TaskDataset, TaskSampler, load_data_list, make_phantoms
from lorkd_monai.engines import DecompositionTrainer, train_loader
from lorkd_monai.engines.adding import network_with_new_tasks, new_tasks_of
from lorkd_monai.errors import LoRKDError
from lorkd_monai.losses import LoRKDLoss
from lorkd_monai.networks import LoRKDNet
from lorkd_monai.networks.checkpoint import load_decomposition, save_weights

BACKBONE = {
    "_target_": "ResNet", "block": "basic", "layers": [1, 1, 1, 1], "block_inplanes": [4, 4, 8, 8],
    "spatial_dims": 2, "n_input_channels": 3, "conv1_t_size": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    make_phantoms(folder, "classification", 2, num_images=16, image_size=24)
    return load_data_list(folder, "classification", 2)


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory):
    first = dataclasses.replace(data, tasks={n: t for n, t in data.tasks.items() if n in ("ct", "ultrasound")})
    net = LoRKDNet(BACKBONE, first.num_classes, rank=2, info=network_info(first, 3, 24))
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
        other = LoRKDNet(BACKBONE, net.num_classes, rank=2, norm="task", info=net.info)
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
