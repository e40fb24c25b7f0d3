"""The pieces of a run: its teacher, objective, schedule, loaders and figures."""

from __future__ import annotations

import json
import math

import pytest
import torch
from monai.networks.nets import ResNet
from torch import nn

from lorkd_monai import engines
from lorkd_monai.bundle import network_info
from lorkd_monai.bundle.facts import resolved_facts
from lorkd_monai.bundle.writer import write_teacher_bundle
from lorkd_monai.checkpoints.weights import save_weights
from lorkd_monai.data import TaskDataset, TaskSampler, load_data_list, make_phantoms
from lorkd_monai.engines.evaluation import figures_table
from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import LoRKDNet, TaskChannels
from lorkd_monai.tasks import Work
from tests.small_networks import SMALL_RESNET


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    make_phantoms(folder, "classification", 2, num_images=10, image_size=16)
    return load_data_list(folder, "classification", 2)


@pytest.fixture(scope="module")
def items(data):
    return TaskDataset(data, "training", 3, 16, progress=False)


@pytest.fixture(scope="module")
def network(data):
    torch.manual_seed(0)
    return LoRKDNet(SMALL_RESNET, data.num_classes, rank=1, info=network_info(data, 3, 16))


@pytest.fixture(scope="module")
def write_teacher(data, tmp_path_factory):
    def write(tasks):
        network = ResNet(
            block="basic", layers=[1, 1, 1, 1], block_inplanes=[4, 4, 8, 12], spatial_dims=2, n_input_channels=3,
            conv1_t_size=3, num_classes=sum(len(task.labels) for task in tasks),
        )  # fmt: skip
        config = {**SMALL_RESNET, "block_inplanes": [4, 4, 8, 12], "num_classes": network.fc.out_features}
        return write_teacher_bundle(
            tmp_path_factory.mktemp("teachers") / "teacher", network=network, network_config=config,
            work=Work("classification", 2, 3, (16, 16), {task.name: task for task in tasks}),
        )  # fmt: skip

    return write


def test_no_teacher_is_one_message(data, tmp_path):
    with pytest.raises(LoRKDError, match="no teacher at .*run `pretraining`.*--teacher_bundle.*--transfer_weight 0"):
        engines.find_teacher(tmp_path / "teacher", data)
    assert engines.find_teacher(tmp_path / "teacher", data, transfer_weight=0) is None


def test_teacher_of_all_tasks(data, items, network, write_teacher):
    teacher = engines.find_teacher(write_teacher(list(data.tasks.values())), data)
    assert teacher.has_logits(list(range(4))).all()
    loss = engines.make_objective(network, teacher, data, items, 0.5, 3.0, "equal")
    assert loss.feature_transfer is None
    assert (loss.transfer_weight, loss.transfer.temperature, loss.transfer.positions) == (0.5, 3.0, "equal")
    assert engines.make_objective(network, teacher, data, items).transfer.positions == "by_class"
    assert list(loss.parameters()) == []


def test_teacher_from_a_weights_file_and_a_config(data, write_teacher, tmp_path):
    bundle = write_teacher(list(data.tasks.values()))
    config = {**SMALL_RESNET, "block_inplanes": [4, 4, 8, 12]}
    config.pop("num_classes", None)
    teacher = engines.find_teacher(bundle / "models" / "model.pt", data, backbone=config)
    x, task = torch.rand(4, 3, 16, 16), torch.arange(4)
    assert torch.equal(teacher(x, task), engines.find_teacher(bundle, data)(x, task))
    with pytest.raises(LoRKDError, match="does not fit the network ResNet"):
        engines.find_teacher(bundle / "models" / "model.pt", data, backbone=SMALL_RESNET)
    with pytest.raises(LoRKDError, match="no teacher at .* a weights file of teacher_backbone"):
        engines.find_teacher(tmp_path / "model.pt", data, backbone=config)


def test_what_a_teacher_is_given_is_one_line(data, write_teacher, tmp_path, caplog):
    own = write_teacher(list(data.tasks.values()))
    caplog.set_level("INFO")
    engines.find_teacher(own, data, in_channels=3, image_size=16)
    assert caplog.messages == ["The teacher teacher is given 3 × 16 × 16, axes and values as the student's."]
    foreign = foreign_teacher(tmp_path / "foreign", data)
    with_view = engines.find_teacher(foreign, data, in_channels=3, image_size=16)
    assert caplog.messages[1:] == [
        "The teacher foreign is given 3 × 16 × 16, axes columns × rows, values -1..1, its steps: LoadImaged "
        "EnsureChannelFirstd Resized ScaleIntensityRanged, not done: Resized to [224, 224]."
    ]
    x = torch.rand(2, 3, 16, 16)
    kept = []
    with with_view.network.register_forward_pre_hook(lambda module, args: kept.append(args[0])):
        with_view(x, 0)
    torch.testing.assert_close(kept[0], x.transpose(2, 3) * 2 - 1, rtol=1e-5, atol=1e-5)


def foreign_teacher(folder, data):
    """A teacher in the form of the model zoo: pictures read as columns × rows, and scaled to -1..1."""
    names = [label for task in data.tasks.values() for label in task.labels.values()]
    steps = [
        {"_target_": "LoadImaged", "keys": "image"},
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
        {"_target_": "Resized", "keys": "image", "spatial_size": [224, 224]},
        {"_target_": "ScaleIntensityRanged", "keys": "image", "a_min": 0, "a_max": 255, "b_min": -1, "b_max": 1},
    ]
    config = {**SMALL_RESNET, "n_input_channels": 3, "num_classes": len(names)}
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    preprocessing = {"_target_": "Compose", "transforms": steps}
    (folder / "configs" / "inference.json").write_text(
        json.dumps({"network_def": config, "preprocessing": preprocessing})
    )
    outputs = {"pred": {"channel_def": dict(enumerate(names))}}
    formats = {"inputs": {"image": {"num_channels": 3}}, "outputs": outputs}
    (folder / "configs" / "metadata.json").write_text(json.dumps({"network_data_format": formats}))
    network = ResNet(**{k: v for k, v in config.items() if k != "_target_"})
    save_weights(folder / "models" / "model.pt", network.state_dict())
    return folder


def test_teacher_that_lacks_a_task_trains_a_projection(data, items, network, write_teacher):
    tasks = [task for name, task in data.tasks.items() if name != "mr"]
    teacher = engines.find_teacher(write_teacher(tasks), data)
    assert teacher.has_logits(list(range(4))).tolist() == [name != "mr" for name in data.tasks]
    training = network.training
    loss = engines.make_objective(network, teacher, data, items)
    assert network.training == training
    projection = loss.feature_transfer.projection
    assert (projection.in_features, projection.out_features) == (8, 12)
    assert projection.weight in set(loss.parameters())
    batch = next(iter(torch.utils.data.DataLoader(items, batch_size=len(items))))
    out, features = network(batch["image"], batch["task"], return_features=True)
    teacher_out, teacher_features = teacher(batch["image"], batch["task"], return_features=True)
    total = loss(
        out, batch["label"], batch["task"], teacher_out, student_features=features,
        teacher_features=teacher_features, has_teacher=teacher.has_logits(batch["task"]),
    )  # fmt: skip
    total.backward()
    assert {"transfer", "feature_transfer"} <= loss.terms.keys()
    assert projection.weight.grad.abs().sum() > 0


def test_without_a_teacher_nothing_is_transferred(data, items, network):
    loss = engines.make_objective(network, None, data, items, transfer_weight=1.0)
    assert loss.transfer_weight == 0


def test_cosine_schedule_by_hand():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = engines.cosine_schedule(optimizer, max_epochs=5)
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.5] + [0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)


@pytest.mark.parametrize("epochs", [1, 2])
def test_short_schedules_learn_too(epochs):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = engines.cosine_schedule(optimizer, epochs)
    for _ in range(epochs):
        assert optimizer.param_groups[0]["lr"] > 0
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("size", [0, -1, 1.5, "8", None, True])
def test_batch_sizes(items, size):
    with pytest.raises(LoRKDError, match="batch_size must be a whole number of at least 1"):
        engines.train_loader(items, range(len(items)), size)


def test_incomplete_batches_are_left_out_unless_there_is_no_other(items):
    sampler = torch.utils.data.SequentialSampler(items)
    assert len(engines.train_loader(items, sampler, 10)) == len(items) // 10
    assert len(engines.train_loader(items, sampler, 1000)) == 1
    loader = engines.test_loader(items)
    assert sum(len(batch["label"]) for batch in loader) == len(items)


def test_settings_are_checked_together():
    engines.check_settings(max_epochs=1, learning_rate=1e-3, image_size=[4, 4], amp=False, unknown="anything", seed=0)
    wrong = {"max_epochs": True, "batch_size": 2.0, "learning_rate": math.inf, "amp": 1, "image_size": [4]}
    with pytest.raises(LoRKDError) as caught:
        engines.check_settings(**wrong, seed=0)
    for name in wrong:
        assert f"{name} must be" in str(caught.value)
    assert "seed" not in str(caught.value)


@pytest.mark.parametrize("few", [0, True, 1.5, "2"])
def test_tasks_of_a_batch_are_a_number_or_null(few):
    with pytest.raises(LoRKDError, match="tasks_per_batch must be a whole number of at least 1, or None"):
        engines.check_settings(batch_size=8, tasks_per_batch=few)


def test_a_batch_holds_an_image_of_each_of_its_tasks():
    engines.check_settings(batch_size=8, tasks_per_batch=8)
    engines.check_settings(batch_size=8, tasks_per_batch=None)
    with pytest.raises(LoRKDError, match=r"tasks_per_batch must be at most batch_size \(8\), got 9"):
        engines.check_settings(batch_size=8, tasks_per_batch=9)


def test_loader_of_few_tasks(items):
    loader = engines.train_loader(items, TaskSampler(items.task_of_item, "balanced"), 8, tasks_per_batch=2)
    batches = list(loader)
    assert len(batches) == len(loader) == len(items) // 8
    for batch in batches:
        assert sorted((batch["task"] == t).sum().item() for t in batch["task"].unique()) == [4, 4]


def test_figures_are_those_of_the_network(data, network):
    split = TaskDataset(data, "test", 3, 16, progress=False)
    figures = engines.evaluate_tasks(network, engines.test_loader(split), data, resamples=50)
    assert list(figures) == list(data.tasks)
    network.eval()
    for index, name in enumerate(data.tasks):
        own = [split[i] for i in range(len(split)) if split.task_of_item[i] == index]
        with torch.no_grad():
            predicted = network(torch.stack([item["image"] for item in own]), index).argmax(1)
        accuracy = (predicted == torch.stack([item["label"] for item in own])).double().mean().item()
        assert figures[name]["accuracy"]["value"] == pytest.approx(accuracy)
        assert figures[name]["accuracy"]["n"] == len(own)


class Moves(nn.Module):
    """A network that lives on another device than the images, and notes where it is sent."""

    def __init__(self, network):
        super().__init__()
        self.elsewhere, self.network, self.places = nn.Parameter(torch.empty(1, device="meta")), network, []

    def to(self, device):
        self.places.append(torch.device(device).type)
        return self

    def forward(self, x, task):
        return self.network(x, task)


def test_the_network_is_where_and_as_it_was_after_an_evaluation(data, network):
    moves = Moves(network).train()
    split = TaskDataset(data, "test", 3, 16, progress=False)
    engines.evaluate_tasks(moves, engines.test_loader(split), data, "cpu", resamples=20)
    assert moves.places == ["cpu", "meta"]
    assert moves.training


def test_nothing_to_evaluate(data, network):
    with pytest.raises(LoRKDError, match="nothing to evaluate"):
        engines.evaluate_tasks(network, torch.utils.data.DataLoader([]), data)


def test_report(data, network, write_teacher, tmp_path, capsys):
    loader = engines.test_loader(TaskDataset(data, "test", 3, 16, progress=False))
    weights, path = tmp_path / "model.pt", tmp_path / "figures.json"
    with pytest.raises(LoRKDError, match="no trained weights at .*: run `training` with the same --output_dir first"):
        engines.report_figures(network, weights, loader, data, "cpu", path, tmp_path / "none")
    save_weights(weights, network.state_dict())
    teacher = write_teacher(list(data.tasks.values()))
    figures = engines.report_figures(network, weights, loader, data, "cpu", path, teacher)
    written = json.loads(path.read_text())
    about = written.pop("data")
    assert written == figures
    assert about["tasks"]["ct"]["classes"] == list(data.tasks["ct"].labels.values())
    assert figures.keys() == {"experts", "teacher"}
    said = capsys.readouterr().out
    assert "| task | n | experts | teacher |" in said
    other = LoRKDNet(SMALL_RESNET, data.num_classes, rank=2)
    save_weights(weights, other.state_dict())
    with pytest.raises(LoRKDError, match="rank"):
        engines.report_figures(network, weights, loader, data, "cpu", path, tmp_path / "none")


def test_table_by_hand():
    experts = {"a": {"dice": {"value": 0.5, "low": 0.25, "high": 0.75, "n": 3}}, "b": {"dice": {"value": 1.0, "n": 2}}}
    lines = figures_table({"experts": experts, "teacher": {"a": experts["b"], "b": {}}}, "dice").splitlines()
    assert lines == [
        "| task | n | experts | teacher |",
        "|---|---|---|---|",
        "| a | 3 | 0.500 (0.250–0.750) | 1.000 |",
        "| b | 2 | 1.000 |  |",
        "| mean of tasks | | 0.750 | 1.000 |",
    ]


def test_facts_for_the_experts_readme(data, network, tmp_path):
    facts = engines.run_facts(network, data, tmp_path / "teacher", 7, {"seed": 0})
    assert facts["epochs"] == 7
    assert facts["experts"].startswith("rank ") and "{" not in facts["experts"]
    assert facts["teacher"]() == {"name": "teacher"}  # there is none in that folder: nothing could be measured
    facts = resolved_facts(facts)
    assert str(tmp_path) not in json.dumps(facts)


def test_a_network_of_all_tasks_seen_task_by_task(data):
    network = TaskChannels.build(SMALL_RESNET, data.num_classes).eval()
    x, task = torch.rand(4, 3, 16, 16), torch.tensor([3, 0, 2, 1])
    with torch.no_grad():
        y, plain = network(x, task), network.network(x)
    assert network.config["num_classes"] == sum(data.num_classes.values())
    starts = torch.tensor([0, *data.num_classes.values()]).cumsum(0)
    for row, t in enumerate(task.tolist()):
        count = list(data.num_classes.values())[t]
        assert torch.equal(y[row, :count], plain[row, starts[t] : starts[t] + count])
        assert (y[row, count:] == float("-inf")).all()
    with torch.no_grad():
        assert torch.equal(network(x, torch.tensor([1])), network(x, torch.ones(4, dtype=torch.long)))
