"""Starting a student from the weights of a larger network of its kind ("weight selection", arXiv 2311.18823)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks.lorkd_net import LoRKDNet

__all__ = ["select_weights"]


@torch.no_grad()
def select_weights(student: LoRKDNet, teacher: nn.Module, least: float = 0.0) -> int:
    """Start a student's shared weights from an even selection of a larger network's; returns how many tensors.

    Tensors of one name and as many axes are taken over where the teacher's is at least as large on each axis: its
    entries at even distances. Layers that follow each other so select the same channels. Heads and experts start anew.

    Args:
        student: changed in place.
        teacher: plain network.
        least: share of the student's shared tensors that must find one, or else nothing is done and 0 is returned.

    Raises:
        LoRKDError: no tensor fits, and ``least`` is 0.
    """
    source = dict(teacher.named_parameters()) | dict(teacher.named_buffers())
    targets = {name: t for name, t in _shared_tensors(student).items() if t.ndim}
    found = {name: source[name] for name, t in targets.items() if name in source and _covers(source[name], t)}
    if len(found) < least * len(targets):
        return 0
    if not found:
        raise LoRKDError(
            "no layer of the student has the name and at most the shape of one of the teacher's, so it can't start "
            "from the teacher's weights: start it at random, or take a smaller network of the teacher's kind"
        )
    for name, tensor in found.items():
        target = targets[name]
        for axis, (o, t) in enumerate(zip(tensor.shape, target.shape, strict=True)):
            tensor = tensor.index_select(axis, torch.linspace(0, o - 1, t).round().long().to(tensor.device))
        target.copy_(tensor)
    return len(found)


def _covers(tensor: Tensor, target: Tensor) -> bool:
    return tensor.ndim == target.ndim and all(o >= t for o, t in zip(tensor.shape, target.shape, strict=True))


def _shared_tensors(student: LoRKDNet) -> dict[str, Tensor]:
    """The backbone's own tensors by the names that they have in the backbone without experts."""
    own = {id(t) for i in range(len(student.tasks)) for t in student.expert_tensors(i).values()}
    layers = {f"{name}.layer.": f"{name}." for name in student.expert_layers}
    result = {}
    for name, tensor in [*student.backbone.named_parameters(), *student.backbone.named_buffers()]:
        if id(tensor) in own:
            continue
        prefix = next((p for p in layers if name.startswith(p)), None)
        result[name if prefix is None else layers[prefix] + name[len(prefix) :]] = tensor
    return result
