"""What the tests of whole networks share."""

from __future__ import annotations

import pickle

import torch
from torch import Tensor, nn

from lorkd_monai.networks import LoRKDNet

TASKS = {"a": 4, "b": 2, "c": 3}  # "a" has as many classes as the backbones


def main_outputs(y) -> list[Tensor]:
    """The class outputs in what a network returns: the first tensor and all of as many dimensions."""
    flat: list[Tensor] = []

    def walk(value):
        if isinstance(value, Tensor):
            flat.append(value)
        elif isinstance(value, dict):
            for v in value.values():
                walk(v)
        elif isinstance(value, (list, tuple)):
            for v in value:
                walk(v)

    walk(y)
    return [t for t in flat if t.ndim == flat[0].ndim]


def class_dim(y: Tensor, x: Tensor) -> int:
    """Outputs of several resolutions that are stacked have their classes in dimension 2."""
    return 2 if y.ndim > x.ndim else 1


@torch.no_grad()
def randomise(network: nn.Module) -> nn.Module:
    """Norms whose statistics and parameters say something, and experts that do; activations stay of one size."""
    for module in network.modules():
        if getattr(module, "running_mean", None) is not None:
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        is_norm = "Norm" in type(module).__name__
        if is_norm and getattr(module, "weight", None) is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    for name, parameter in network.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    return network


def made(backbone: nn.Module, tasks=TASKS, **options) -> LoRKDNet:
    """A decomposition in evaluation mode with trained-looking experts and norms."""
    return randomise(LoRKDNet(backbone, tasks, **{"rank": 2, "alpha": 2.0, **options})).eval()


def owned_by_task(net: LoRKDNet, task: str) -> set[str]:
    """Names of the parameters in ``net`` that belong to one task."""
    own = {id(t) for t in net.expert_tensors(net.task_index(task)).values()}
    return {n for n, p in net.named_parameters() if id(p) in own}


def assert_nothing_of_ours(network: nn.Module, backbone: nn.Module) -> None:
    """``network`` is of the backbone's classes, with its keys and hooks, and holds nothing of this package."""
    theirs, own = dict(backbone.named_modules()), dict(network.named_modules())
    assert list(own) == list(theirs)
    assert list(network.state_dict()) == list(backbone.state_dict())
    hooks = [k for k in vars(nn.Module()) if k.endswith("_hooks")]
    for name, module in own.items():
        assert type(module) is type(theirs[name]), name
        assert vars(module).keys() == vars(theirs[name]).keys(), name
        for kind in hooks:
            assert len(getattr(module, kind)) == len(getattr(theirs[name], kind)), f"{name}: {kind}"
    assert network.training == backbone.training
    assert b"lorkd" not in pickle.dumps(network)
