"""A trial of the experts, before anything is trained.

A network may fix its number of outputs outside the head, by a reshape for example. Its decomposition runs all the same,
as every output is filled up to the widest task's; the expert of a task with fewer classes, alone, does not. Or a layer
after the head mixes the classes, and with them the -inf that fills an output up. So experts are tried on one sample.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks.routing.folding import buffers_kept
from lorkd_monai.networks.routing.table import route
from lorkd_monai.networks.surgery.heads import head_like
from lorkd_monai.networks.surgery.outputs import first_rows, first_tensor, map_classes, narrow_classes
from lorkd_monai.networks.surgery.replace import replace_module

__all__ = ["try_experts"]

_CLOSE = 0.01  # of the largest output; what -inf spoils is off by more, and both runs round alike
_LOCK = threading.Lock()  # modules are put into evaluation mode for the trial


@torch.compiler.disable
@torch.no_grad()
def try_experts(net: Any, x: Tensor, kwargs: Mapping) -> None:
    """Run one expert of each number of classes that is not the backbone's own, on the first sample of a batch.

    Args:
        net: the decomposition, a :class:`~lorkd_monai.networks.LoRKDNet`, which calls this.
        x: a batch.
        kwargs: further arguments of the backbone.

    Raises:
        LoRKDError: an expert does not run where the backbone does, gives another number of classes than its task has,
            or not what the decomposition gives for its task.
    """
    built = net._built_classes
    sample, kwargs = x[:1], first_rows(kwargs, x.shape[0], 1)
    shared = {id(t): t for t in (*net.backbone.parameters(), *net.backbone.buffers())}
    with _LOCK, torch.random.fork_rng([x.device] if x.is_cuda else []), _evaluating(net.backbone):
        for classes in sorted({*net.num_classes.values()} - {built}):
            task = list(net.num_classes.values()).index(classes)
            expert = net._plain(task, shared)
            try:
                y = _run(expert, sample, kwargs, classes)
            except Exception as e:
                if _backbone_runs(net, expert, sample, kwargs):
                    raise LoRKDError(
                        f"the expert of task {net.tasks[task]!r} with {classes} outputs could not run: "
                        f"{type(net.backbone).__name__} fixes its {built} outputs outside its head "
                        f"{', '.join(map(repr, net._heads))} ({type(e).__name__}: {' '.join(str(e).split())[:120]}). "
                        "Name the head that sets all of them with head=…, take a network whose outputs follow its "
                        f"head, or give every task {built} classes"
                    ) from e
                return  # it is not for the classes that it fails: its own forward says why
            _compare(net, task, sample, kwargs, y)
    net._tried = True


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    training = [m for m in network.modules() if m.training]
    for module in training:
        module.training = False
    try:
        with buffers_kept(network):
            yield
    finally:
        for module in training:
            module.training = True


def _run(network: nn.Module, sample: Tensor, kwargs: Mapping, classes: int) -> Any:
    torch.manual_seed(0)  # a network that draws draws the same each time
    return map_classes(lambda t, dim: t, network(sample, **kwargs), classes, sample.ndim)


def _backbone_runs(net: Any, expert: nn.Module, sample: Tensor, kwargs: Mapping) -> bool:
    """Whether the network runs, its heads taking part, with as many outputs as it was built with."""
    built, called = net._built_classes, []
    for name in net._heads:
        head = head_like(expert.get_submodule(name), built, name)
        head.register_forward_hook(lambda *_: called.append(True))
        replace_module(expert, expert.get_submodule(name), head)
    for attribute in ("out_channels", "num_classes"):
        if getattr(expert, attribute, None) in net.num_classes.values():
            setattr(expert, attribute, built)
    torch.manual_seed(0)
    try:
        expert(sample, **kwargs)  # what it returns need not be classes
    except Exception:
        return False
    return bool(called)


def _compare(net: Any, task: int, sample: Tensor, kwargs: Mapping, expected: object) -> None:
    classes, widest = list(net.num_classes.values())[task], max(net.num_classes.values())
    if classes == widest:
        return
    torch.manual_seed(0)
    with route(task, batch_size=1):
        routed = net.backbone(sample, **kwargs)
    expected, y = first_tensor(expected), first_tensor(narrow_classes(routed, widest, classes, sample.ndim))
    if expected.shape != y.shape or not torch.allclose(
        y, expected, rtol=0.0, atol=_CLOSE * float(expected.abs().max().nan_to_num(1.0)), equal_nan=True
    ):
        raise LoRKDError(
            f"what {type(net.backbone).__name__} computes after its head {', '.join(map(repr, net._heads))} mixes "
            f"the classes: for task {net.tasks[task]!r}, with {classes} of {widest}, the decomposition does not give "
            "what the expert alone gives. Leave that to the loss, or give every task as many classes"
        )
