"""The promises over MONAI's networks, 2D and 3D, with norms shared and by task."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.bundle import ConfigParser
from torch import nn

from lorkd_monai.networks import LoRKDNet
from tests.networks.common import TASKS, assert_nothing_of_ours, class_dim, made, main_outputs, owned_by_task, randomise
from tests.networks.reference import assert_close
from tests.networks.zoo import ZOO

NAMES = list(TASKS)
TASK_NORMS = (nn.modules.batchnorm._NormBase,)


def has_task_norms(network):
    return any(isinstance(m, TASK_NORMS) and m.affine for m in network.modules())


def settings():
    for entry in ZOO:
        yield pytest.param(entry, "shared", id=f"{entry}-shared")
        if not entry.heavy and has_task_norms(entry.build()):
            yield pytest.param(entry, "task", id=f"{entry}-task")


def weighted(outputs, weights):
    """A number that all finite entries of the outputs go into."""
    return sum((y.masked_fill(y.isinf(), 0) * w[..., : y.shape[-1]]).sum() for y, w in zip(outputs, weights))


@pytest.mark.parametrize(("entry", "norm"), list(settings()))
def test_promises(entry, norm):
    torch.manual_seed(0)
    dtype = torch.float32 if entry.heavy else torch.float64
    backbone = randomise(entry.build()).to(dtype).eval()
    before = copy.deepcopy(backbone.state_dict())
    tasks = [2, 0, 1] if entry.heavy else [2, 0, 2, 1]
    x = torch.rand(len(tasks), entry.channels, *[entry.size] * entry.dims).to(dtype)

    fresh = LoRKDNet(backbone, TASKS, rank=2, norm=norm).eval()
    with torch.no_grad():
        expected = main_outputs(backbone(x))
        with torch.enable_grad():  # the routed path
            outputs = main_outputs(fresh(x[:1], "a"))
        assert_same_outputs(main_outputs(fresh(x, "a")), expected, "fresh")
        assert_same_outputs([y.detach() for y in outputs], [y[:1] for y in expected], "fresh and routed")
    state = backbone.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[k], before[k]) for k in before)

    net = randomise(fresh)
    check_mixed_and_separated(net, x, tasks, gradients=not entry.heavy)
    check_extraction(net, backbone, x[:2], NAMES[1:2] if entry.heavy else NAMES)


def assert_same_outputs(got, expected, what):
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert_close(a, b, what=what)


def check_mixed_and_separated(net, x, tasks, gradients):
    """Mixed batches equal separate passes in outputs and gradients; a task's loss stays with its task."""
    parameters = dict(net.named_parameters())
    with torch.set_grad_enabled(gradients):
        mixed = main_outputs(net(x, torch.tensor(tasks)))
    weights = [torch.rand_like(y) for y in mixed]
    total = {n: torch.zeros_like(p) for n, p in parameters.items()} if gradients else {}
    for row, task in enumerate(tasks):
        with torch.enable_grad():
            alone = main_outputs(net(x[row : row + 1], task))
        assert_same_outputs([y[row : row + 1] for y in mixed], alone, "mixed")
        for y in alone:
            padding = y.transpose(1, class_dim(y, x))[:, TASKS[NAMES[task]] :]
            assert torch.equal(padding, torch.full_like(padding, -torch.inf))
        if gradients:
            loss = weighted(alone, [w[row : row + 1] for w in weights])
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            strangers = set().union(*(owned_by_task(net, t) for t in NAMES if t != NAMES[task]))
            assert strangers
            for (name, _), gradient in zip(parameters.items(), found):
                if gradient is not None:
                    assert name not in strangers or not gradient.any(), name
                    total[name] += gradient
            assert any(total[n].any() for n in owned_by_task(net, NAMES[task]) if ".lora_" in n)
    if gradients:
        found = torch.autograd.grad(weighted(mixed, weights), list(parameters.values()), allow_unused=True)
        for (name, p), gradient in zip(parameters.items(), found):
            assert_close(torch.zeros_like(p) if gradient is None else gradient, total[name], what=name)


def check_extraction(net, backbone, x, names):
    for name in names:
        plain = net.extract(name)
        assert_nothing_of_ours(plain, backbone)
        with torch.no_grad():
            outputs, served, routed = main_outputs(plain(x)), main_outputs(net(x, name)), None
        with torch.enable_grad():
            routed = main_outputs(net(x, name))
        for y, s, r in zip(outputs, served, routed, strict=True):
            dim, own = class_dim(y, x), TASKS[name]
            assert y.shape[dim] == own
            assert torch.equal(s.narrow(dim, 0, own), y)
            assert_close(r.narrow(dim, 0, own), y, what="routed")


def given_as_config(entry):
    argument = "num_classes" if "num_classes" in entry.config else "out_channels"
    return {k: v for k, v in entry.config.items() if k != argument}


@pytest.mark.parametrize("entry", [e for e in ZOO if e.dims == 2], ids=str)
def test_configs_checkpoints_and_copies(entry, tmp_path):
    torch.manual_seed(0)
    net = made(given_as_config(entry), norm="task")
    assert net.spec()["backbone"]
    x = torch.rand(3, entry.channels, *[entry.size] * entry.dims)
    expected = main_outputs(net(x, [2, 0, 1]))
    for name in NAMES:
        plain = net.extract(name)
        rebuilt = ConfigParser(net.backbone_config(name)).get_parsed_content().eval()
        assert type(rebuilt) is type(plain)
        rebuilt.load_state_dict(plain.state_dict(), strict=True)
        for a, b in zip(main_outputs(rebuilt(x)), main_outputs(plain(x)), strict=True):
            assert torch.equal(a, b)
    torch.save(net.state_dict(), tmp_path / "state.pt")
    again = LoRKDNet.from_spec(net.spec()).eval()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.save(net, tmp_path / "net.pt")
    for other in (again, copy.deepcopy(net), torch.load(tmp_path / "net.pt", weights_only=False)):
        assert other.spec() == net.spec()
        for a, b in zip(main_outputs(other(x, [2, 0, 1])), expected, strict=True):
            assert torch.equal(a, b)
    net.eval().switch_to("b")
    with torch.no_grad():
        for a, b in zip(main_outputs(net(x)), main_outputs(net.extract("b")(x)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["DynUNet-deep", "SegResNetDS", "MedNeXt-deep", "BasicUNet++"])
def test_deep_supervision_in_training_mode(name):
    entry = next(e for e in ZOO if e.name == name and e.dims == 2)
    config = dict(entry.config)
    if name == "BasicUNet++":
        config["deep_supervision"] = True
    if name == "SegResNetDS":
        config["norm"] = "instance"  # batch statistics would mix the samples
    torch.manual_seed(0)
    backbone = ConfigParser(config).get_parsed_content().double().train()
    net = randomise(LoRKDNet(backbone, TASKS, rank=2)).train()
    x = torch.rand(3, 2, 32, 32).double()
    shapes = [y.shape for y in main_outputs(backbone(x))]
    outputs = main_outputs(net(x, "a"))
    assert [y.shape for y in outputs] == shapes
    assert len(outputs) > 1 or outputs[0].ndim == 5
    check_mixed_and_separated(net, x, [2, 0, 1], gradients=True)
    for task in NAMES:
        plain = net.extract(task)
        assert plain.training
        for y, own in zip(main_outputs(plain(x)), main_outputs(net(x, task)), strict=True):
            dim = class_dim(y, x)
            assert_close(own.narrow(dim, 0, TASKS[task]), y)
