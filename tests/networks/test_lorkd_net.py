"""LoRKDNet itself: its arguments, tasks, experts, switching, and what it refuses."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import BasicUNet, DynUNet, resnet10
from torch import nn

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import LoRKDNet, Routing
from lorkd_monai.networks.surgery.heads import find_heads, head_like
from lorkd_monai.networks.task_banks import HeadBank
from tests.networks.common import TASKS, made, owned_by_task, randomise
from tests.networks.zoo import ZOO

NAMES = list(TASKS)


def resnet(classes=4):
    return resnet10(spatial_dims=2, n_input_channels=1, num_classes=classes, widen_factor=0.125)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return made(resnet()).double()


@pytest.fixture(scope="module")
def x():
    return torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(1)).double()


# ---------------------------------------------------------------------- tasks of a call


@pytest.mark.parametrize(
    "task",
    [
        torch.tensor([2, 0, 1, 0]),
        torch.tensor([2, 0, 1, 0], dtype=torch.int32),
        [2, 0, 1, 0],
        ["c", "a", "b", "a"],
        ["c", 0, "b", 0],
        np.array([2, 0, 1, 0]),
    ],
)
def test_forms_of_task(net, x, task):
    y = net(x, task)
    assert y.shape == (4, 4)
    assert torch.allclose(y[2, :2], net(x[2:3], "b")[0, :2], atol=1e-12)
    assert y.isinf().sum(1).tolist() == [1, 0, 2, 0]


@pytest.mark.parametrize("task", ["b", 1, torch.tensor([1]), torch.tensor(1), [1], ["b"], np.int64(1)])
def test_one_task_for_the_batch(net, x, task):
    assert torch.equal(net(x, task), net(x, torch.tensor([1, 1, 1, 1])))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (None, r"task is needed.*with serving"),
        ("d", "unknown task 'd': this network has a, b, c"),
        (["a", "d", "a", "a"], "unknown task 'd'"),
        (3, "unknown task 3: this network has 3 tasks, 0 to 2"),
        (-1, "unknown task -1"),
        (torch.tensor([0, 1, 2, 3]), "unknown task 3"),
        (torch.tensor([0, 1]), "2 entries for a batch of 4 samples"),
        ([0, 1, 2, 0, 1], "5 entries for a batch of 4"),
        (torch.tensor([0.0, 1.0, 0.0, 0.0]), "must be a LongTensor"),
        (torch.tensor([[0], [1], [0], [0]]), "must be a LongTensor"),
        ([], "task is empty"),
        (True, "must be a task index"),
        (0.5, "must be a task index"),
        (["a", None, "a", "a"], "a task is a name or an index, got None"),
    ],
)
def test_wrong_tasks(net, x, task, message):
    with pytest.raises(LoRKDError, match=message):
        net(x, task)


def test_meta_tensors(net, x):
    y = net(MetaTensor(x, meta={"a": 1}), [2, 0, 1, 0])
    assert isinstance(y, MetaTensor) and torch.equal(y.as_tensor(), net(x, [2, 0, 1, 0]))


def test_features(net, x):
    y, features = net(x, [2, 0, 1, 0], return_features=True)
    for row, task in enumerate([2, 0, 1, 0]):
        head = net.extract(task).fc
        assert torch.allclose(head(features[row]), y[row, : TASKS[NAMES[task]]], atol=1e-12)
        alone = net(x[row : row + 1], task, return_features=True)[1][0]
        assert torch.allclose(alone, features[row], atol=1e-12)


def test_features_of_deep_supervision_are_those_of_the_full_resolution():
    backbone = DynUNet(2, 1, 4, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 6, 8], deep_supervision=True)
    for mode in (True, False):
        net = made(backbone).train(mode)
        assert net(torch.rand(2, 1, 16, 16), [1, 0], return_features=True)[1].shape == (2, 4)


def test_sliding_window():
    net = made(BasicUNet(2, 1, 4, features=(2, 2, 2, 2, 2, 2)))
    x = torch.rand(1, 1, 48, 40)
    inferer = SlidingWindowInferer(32, sw_batch_size=3, overlap=0.25)
    with torch.no_grad():
        y = inferer(x, net, task=torch.tensor([1]))
        assert torch.equal(y[:, :2], inferer(x, net.extract("b")))


def test_threads_do_not_mix(net, x):
    tasks = [[0] * 4, [1] * 4, [2, 0, 1, 0], [2] * 4]
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            expected = [net(x, t).detach() for t in tasks]
        barrier, failures = threading.Barrier(len(tasks)), []

        def work(i, gradients=gradients, expected=expected, barrier=barrier, failures=failures):
            try:
                with torch.set_grad_enabled(gradients):
                    for _ in range(8):
                        barrier.wait(timeout=60)
                        torch.testing.assert_close(net(x, tasks[i]), expected[i], rtol=1e-12, atol=1e-12)
            except BaseException as e:
                failures.append(e)
                barrier.abort()

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(tasks))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures[0]


# ---------------------------------------------------------------------- what the constructor refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": {}}, "tasks must map"),
        ({"tasks": ["a", "b"]}, "tasks must map"),
        ({"tasks": {"": 2}}, "non-empty string"),
        ({"tasks": {3: 2}}, "non-empty string"),
        ({"tasks": {"a": 0}}, "at least 1, got 0"),
        ({"tasks": {"a": 2.0}}, "at least 1, got 2.0"),
        ({"tasks": {"a": True}}, "at least 1, got True"),
        ({"rank": -1}, "rank of task 'a'"),
        ({"rank": 1.5}, "rank of task 'a'"),
        ({"rank": "4"}, "rank of task 'a'"),
        ({"rank": {"a": 4}}, "rank names the tasks a; expected a, b, c"),
        ({"rank": {"a": 4, "b": 4, "c": 0}}, "0 for all tasks or for none"),
        ({"layout": "peft"}, "layout must be one of"),
        ({"norm": "batch"}, "norm must be one of"),
        ({"alpha": "16"}, "must be numbers"),
        ({"scale": "2"}, "must be numbers"),
        ({"head": "classifier"}, r"no layer 'classifier' in ResNet.*candidates are: .*layer4.0.conv2"),
        ({"head": "bn1"}, "no layer 'bn1'"),
        ({"head": []}, "head: no layer"),
        ({"include": ["encoder*"]}, r"include: 'encoder\*' matches no layer"),
        ({"exclude": ["conv1", "encoder*"]}, r"exclude: 'encoder\*' matches no layer"),
        ({"include": ["conv1"], "exclude": ["conv1"]}, "no layer gets an expert"),
        ({"rank_pattern": {"encoder*": 2}}, r"rank_pattern: 'encoder\*' matches no layer"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(LoRKDError, match=message):
        LoRKDNet(**{"backbone": resnet(), "tasks": TASKS, **options})


@pytest.mark.parametrize(
    ("backbone", "error", "message"),
    [
        (None, TypeError, "backbone must be"),
        ("resnet", TypeError, "backbone must be"),
        ({"spatial_dims": 2}, TypeError, "backbone must be"),
        ({"_target_": "BasicUNet", "nonsense": 1}, LoRKDError, "BasicUNet could not be built.*nonsense"),
        ({"_target_": "monai.losses.DiceLoss"}, LoRKDError, "head|could not|expected a network"),
        ({"_target_": "BasicUNet", "act": nn.ReLU()}, LoRKDError, "must consist of numbers, strings and lists"),
        (nn.Linear(3, 4), LoRKDError, "single layer"),
        (nn.Sequential(nn.Flatten(), nn.ReLU()), LoRKDError, "could not tell the last layer.*none: it has no conv"),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), LoRKDError, "could not tell the last layer.*are: 0"),
    ],
)
def test_bad_backbones(backbone, error, message):
    with pytest.raises(error, match=message):
        LoRKDNet(backbone, TASKS)


# ---------------------------------------------------------------------- layers and heads


def test_which_layers_get_experts():
    net = LoRKDNet(resnet(), TASKS, include=["layer1*", "conv1"], exclude=["*conv2"], rank_pattern={"conv1": 2})
    assert list(net.expert_layers) == ["conv1", "layer1.0.conv1"]
    assert net.expert_layers["conv1"].ranks == [8, 8, 8] and net.expert_layers["layer1.0.conv1"].ranks == [4, 4, 4]
    assert net.expert_layers["conv1"].scales == [2.0] * 3  # alpha / the layer's own rank
    assert LoRKDNet(resnet(), TASKS, scale=0.5).expert_layers["conv1"].scales == [0.5] * 3


def test_imbalanced_ranks():
    net = LoRKDNet(resnet(), TASKS, rank={"c": 3, "a": 1, "b": 2}, rank_pattern={"layer4*": 2})
    assert net.expert_layers["conv1"].ranks == [1, 2, 3]
    assert net.expert_layers["layer4.0.conv1"].ranks == [2, 4, 6]
    assert net.expert_layers["conv1"].scales == [16.0, 8.0, 16 / 3]


def test_depthwise_convolutions_stay_shared_by_default():
    network = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(8, 4))
    assert list(LoRKDNet(network, TASKS).expert_layers) == ["1"]
    assert list(LoRKDNet(network, TASKS, include=["0"]).expert_layers) == ["0"]


def test_rank_0_is_a_multi_task_network(x):
    net = made(resnet(), rank=0).double()
    assert not net.expert_layers and not any("lora" in n for n, _ in net.named_parameters())
    assert torch.allclose(net(x, [2, 0, 1, 0])[1], net(x[1:2], "a")[0], atol=1e-12)


def test_heads_of_known_networks_are_found():
    expected = {
        "ResNet": ["fc"], "DenseNet": ["class_layers.out"], "SENet": ["last_linear"], "EfficientNet": ["_fc"],
        "ViT": ["classification_head"], "BasicUNet": ["final_conv"], "DynUNet": ["output_block"],
        "DynUNet-deep": ["output_block", "deep_supervision_heads.0"], "SegResNet": ["conv_final.2"],
        "SwinUNETR": ["out"], "VNet": ["out_tr"], "MedNeXt-deep": ["out_0", *(f"out_blocks.{i}" for i in range(4))],
        "FlexibleUNet": ["segmentation_head.0"],
    }  # fmt: skip
    for entry in ZOO:
        if entry.name in expected and entry.dims == 2:
            assert find_heads(entry.build()) == expected[entry.name], entry.name


def test_head_of_several_layers():
    head = nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4), nn.Conv2d(4, 4, 1), nn.GroupNorm(4, 4))
    other = head_like(head, 2, "head").eval()
    assert other(torch.rand(1, 6, 5, 5)).shape == (1, 2, 3, 3)
    same = head_like(head, 4, "head")
    assert all(torch.equal(v, same.state_dict()[k]) for k, v in head.state_dict().items())
    with pytest.raises(LoRKDError, match="its layer '0' maps 6 to 5 channels"):
        head_like(nn.Sequential(nn.Conv2d(6, 5, 1), nn.Conv2d(5, 4, 1)), 2, "head")


def test_heads_of_different_widths_are_refused():
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    with pytest.raises(LoRKDError, match=r"0, 1 differ in output channels: \[4, 5\]"):
        LoRKDNet(network, TASKS, head=["0", "1"])


def test_head_named_by_the_user():
    network = nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 4), nn.BatchNorm1d(4))
    net = LoRKDNet(network, {"a": 4, "b": 4}, head="3")
    assert isinstance(net.backbone[3], HeadBank) and list(net.expert_layers) == ["1"]


# ---------------------------------------------------------------------- extraction and switching


def test_extracted_networks_run_where_this_package_is_not(net, x, tmp_path):
    others = [made(e.build()).extract("b") for e in ZOO if e.dims == 2 and e.name in ("UNet", "ViT", "DynUNet-deep")]
    for i, plain in enumerate([net.extract("b"), *others]):
        torch.save(plain, tmp_path / f"{i}.pt")
    torch.save((x, net.extract("b")(x).detach()), tmp_path / "expected.pt")
    code = f"""
import sys, torch
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lorkd_monai":
            raise ImportError("not installed")
sys.meta_path.insert(0, Blocked())
nets = [torch.load(f"{tmp_path}/{{i}}.pt", weights_only=False) for i in range({1 + len(others)})]
x, y = torch.load("{tmp_path}/expected.pt")
assert torch.equal(nets[0](x), y)
assert not any(m.startswith("lorkd") for m in sys.modules)
print("ran")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.strip() == "ran", run.stderr


def test_extraction_copies(net):
    plain = net.extract("b")
    before = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        for p in plain.parameters():
            p.zero_()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert plain.fc.out_features == 2 and all(p.requires_grad for p in plain.parameters())


def test_any_sequence_of_switches_is_exact():
    net = made(resnet())
    x = torch.rand(2, 1, 32, 32)
    before = copy.deepcopy(net.state_dict())
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for step in range(12):
            task = int(torch.randint(0, 3, (), generator=draw))
            net.switch_to(task if step % 2 else NAMES[task])
            assert torch.equal(net(x), net.extract(task)(x))
            if step % 4 == 3:
                net.switch_off()
                with pytest.raises(LoRKDError, match="task is needed"):
                    net(x)
    net.switch_off()
    state = net.state_dict()
    assert all(torch.equal(state[k], before[k]) for k in before)
    with pytest.raises(LoRKDError, match="unknown task 'd'"):
        net.switch_to("d")


def test_switching_follows_the_weights():
    net = made(resnet())
    x = torch.rand(2, 1, 32, 32)
    net.switch_to("b")
    with torch.no_grad():
        first = net(x)
        net.expert_layers["conv1"].lora_B[1].add_(1)
        assert not torch.equal(net(x), first) and torch.equal(net(x), net.extract("b")(x))
        net.backbone.layer1[0].conv1.layer.weight.mul_(2)
        assert torch.equal(net(x), net.extract("b")(x))
        net.load_state_dict(made(resnet()).state_dict())
        assert torch.equal(net(x), net.extract("b")(x))


# ---------------------------------------------------------------------- experts as weights, tasks that come and go


def test_expert_state_dict_round_trip(x):
    net, other = made(resnet(), norm="task").double(), made(resnet(), norm="task").double()
    other.load_state_dict(net.state_dict())
    state = {k: v.clone() for k, v in net.expert_state_dict("b").items()}
    assert {k.split(".")[-1] for k in state} >= {"lora_A", "lora_B", "weight", "bias", "running_mean"}
    randomise(other)
    other.load_expert_state_dict("b", state)
    changed = {k for k, v in other.state_dict().items() if not torch.equal(v, net.state_dict()[k])}
    assert changed and not changed & owned_by_task(other, "b")


def test_expert_state_dict_that_does_not_fit():
    net = LoRKDNet(resnet(), TASKS, rank=2)
    good = net.expert_state_dict("b")
    before = copy.deepcopy(net.state_dict())
    for state, message in (
        ({k: v for k, v in good.items() if k != "conv1.lora_A"}, r"1 missing \(conv1.lora_A\)"),
        ({**good, "surprise": torch.ones(1)}, r"1 unknown \(surprise\)"),
        (LoRKDNet(resnet(), TASKS, rank=3).expert_state_dict("b"), r"conv1.lora_A is \(21, 7\), expected \(14, 7\)"),
        (net.expert_state_dict("c"), r"fc.weight is \(3, 64\), expected \(2, 64\)"),
    ):
        with pytest.raises(LoRKDError, match=f"expert of task 'b' does not fit.*{message}"):
            net.load_expert_state_dict("b", state)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("norm", ["shared", "task"])
def test_add_task(x, norm):
    net = made(resnet(), norm=norm).double()
    before = net(x, [2, 0, 1, 0]).detach()
    net.add_task("d", 6, rank=3, freeze=True)
    assert net.tasks == ["a", "b", "c", "d"] and net.num_classes["d"] == 6
    assert net.expert_layers["conv1"].ranks == [2, 2, 2, 3]
    y = net(x, [2, 0, 1, 0])
    assert y.shape == (4, 6) and torch.equal(y[:, :4], before)
    own = owned_by_task(net, "d")
    assert {n for n, p in net.named_parameters() if p.requires_grad} == own
    net.train()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    net(x, "d").square().mean().backward()
    optimizer.step()
    net.eval()
    assert torch.equal(net(x, [2, 0, 1, 0])[:, :4], before)
    assert net.extract("d").fc.out_features == 6
    net.remove_task("b")
    assert net.tasks == ["a", "c", "d"]
    assert torch.allclose(net(x, [1, 0, 1, 0])[0, :3], before[0, :3], atol=1e-12)
    with pytest.raises(LoRKDError, match="'a' exists already"):
        net.add_task("a", 2)
    with pytest.raises(LoRKDError, match="at least 1"):
        net.add_task("e", 0)
    with pytest.raises(LoRKDError, match="rank 0 for task 'e'"):
        net.add_task("e", 2, rank=0)
    assert net.tasks == ["a", "c", "d"]
    for task in ("a", "c"):
        net.remove_task(task)
    with pytest.raises(LoRKDError, match="is the last one"):
        net.remove_task("d")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": {"a": 4, "b": 2}}, "tasks: checkpoint .*'c'"),
        ({"tasks": {"b": 2, "a": 4, "c": 3}}, "tasks: checkpoint"),
        ({"rank": 3}, "rank: checkpoint"),
        ({"layout": "conv"}, "layout: checkpoint lorkd, this network conv"),
        ({"norm": "task"}, "norm: checkpoint shared, this network task"),
        ({"alpha": 8.0}, "alpha: checkpoint"),
        ({"exclude": ["conv1"]}, "exclude: checkpoint None"),
    ],
)
def test_checkpoint_of_another_decomposition(options, message):
    state = LoRKDNet(resnet(), TASKS, rank=2).state_dict()
    other = LoRKDNet(**{"backbone": resnet(), "tasks": TASKS, "rank": 2, **options})
    with pytest.raises((LoRKDError, RuntimeError), match=f"belongs to another decomposition: .*{message}"):
        other.load_state_dict(state)


def test_pickles_and_copies(net, x):
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x, [2, 0, 1, 0]), net(x, [2, 0, 1, 0]))
        with torch.no_grad():
            assert torch.equal(other(x, "b"), net(x, "b"))
            other.backbone.conv1.layer.weight.zero_()
            assert not torch.equal(other(x, "b"), net(x, "b"))


def test_pretrained_weights_are_not_fetched_again():
    config = {
        "_target_": "FlexibleUNet",
        "in_channels": 1,
        "backbone": "resnet10",
        "pretrained": False,
        "spatial_dims": 2,
    }
    net = LoRKDNet(config, {"a": 2})
    net._config["pretrained"] = True  # as if they had been fetched for the training
    assert net.backbone_config("a")["pretrained"] is False and net.backbone_config("a")["out_channels"] == 2


def test_a_routing_that_was_made_by_hand_is_refused(net, x):
    with pytest.raises(LoRKDError, match="must be a task index"):
        net(x, Routing([0, 1, 2, 0]))
