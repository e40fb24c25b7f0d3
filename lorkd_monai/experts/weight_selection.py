"""Start a student from the weights of a larger network of its kind ("weight selection", arXiv 2311.18823)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks.lorkd_net import LoRKDNet
from lorkd_monai.networks.task_banks import NormBank

__all__ = ["select_weights"]


@torch.no_grad()
def select_weights(student: LoRKDNet, teacher: nn.Module, least: float = 0.0) -> int:
    """Start a student's shared weights, and its norms, from evenly spaced entries of a larger network's.

    A tensor is taken where the teacher has one of the same name and number of axes that is at least as large on each
    axis. Layers that follow each other so select the same channels. The norms of all tasks start alike; heads and
    experts start fresh.

    Args:
        student: changed in place.
        teacher: plain network.
        least: share of the student's tensors that must find one; below it nothing is changed and 0 is returned.

    Returns:
        The number of tensors taken.

    Raises:
        LoRKDError: no tensor fits and ``least`` is 0.
    """
    source = dict(teacher.named_parameters()) | dict(teacher.named_buffers())
    targets = {name: found for name, found in _tensors(student).items() if found[0].ndim}
    fitting = {
        name: source[name]
        for name, (target, *_) in targets.items()
        if name in source
        and source[name].ndim == target.ndim
        and all(theirs >= own for theirs, own in zip(source[name].shape, target.shape, strict=True))
    }
    if len(fitting) < least * len(targets):
        return 0
    if not fitting:
        raise LoRKDError(
            "no layer of the student has the name and at most the shape of one of the teacher's, so it can't start "
            "from the teacher's weights: start it at random, or take a smaller network of the teacher's kind"
        )
    for name, tensor in fitting.items():
        for axis, (o, t) in enumerate(zip(tensor.shape, targets[name][0].shape, strict=True)):
            tensor = tensor.index_select(axis, torch.linspace(0, o - 1, t).round().long().to(tensor.device))
        for target in targets[name]:
            target.copy_(tensor)
    return len(fitting)


def _tensors(student: LoRKDNet) -> dict[str, list[Tensor]]:
    """The tensors to start, by their name in the plain network: one, or one for each task's norm."""
    own = {id(t) for i in range(len(student.tasks)) for t in student.expert_tensors(i).values()}
    layers = {f"{name}.layer.": f"{name}." for name in student.expert_layers}
    result = {}
    for name, tensor in [*student.backbone.named_parameters(), *student.backbone.named_buffers()]:
        if id(tensor) in own:
            continue
        prefix = next((p for p in layers if name.startswith(p)), None)
        result[name if prefix is None else layers[prefix] + name[len(prefix) :]] = [tensor]
    for name, bank in student.backbone.named_modules():
        if isinstance(bank, NormBank):
            for task in range(bank.num_tasks):
                for key, tensor in bank.expert_tensors(task).items():
                    result.setdefault(f"{name}.{key}", []).append(tensor)
    return result
