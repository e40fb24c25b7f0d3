"""Nested experts: trained so that their first k components work alone, for each k up to their rank.

An expert of rank r is a sum of r components, ΔW = scale · Σ_j B_j A_j, where A_j is rows j·k0 … (j+1)·k0 of A and B_j
the same columns of B (k0 = 1 with the layout ``"conv"`` and in linear layers). In training, each call draws a k from
1..r for each task, all equally likely, and leaves out the components after the k-th (ordered dropout, as in nested
low-rank training). The scale is always that of the whole expert.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks.eks.factors import factor_shapes
from lorkd_monai.networks.lorkd_net import LoRKDNet
from lorkd_monai.networks.spec import cut_rank, layer_rank, misfits

__all__ = ["cut_expert_state", "exchange_expert"]


def cut_expert_state(net: LoRKDNet, task: str | int, rank: int) -> dict[str, Tensor]:
    """The expert of a task, cut to a lower rank: as :meth:`LoRKDNet.expert_state_dict` of one with that rank.

    The scale depends on the rank; B is multiplied by the ratio.
    """
    index, k = net.task_index(task), cut_rank(net, task, rank)
    state = net.expert_state_dict(index)
    for name, layer in net.expert_layers.items():
        a, b = layer.factors(index, k)
        ratio = layer.scales[index] / net.layer_scale(layer_rank(k, layer.rank_factor))
        state |= {f"{name}.lora_A": a.detach(), f"{name}.lora_B": b.detach() * ratio}
    return state


def exchange_expert(net: LoRKDNet, task: str | int, state: Mapping[str, Tensor], rank: int) -> None:
    """Replace a task's expert by one of any rank; nothing is changed if it does not fit.

    A call that runs meanwhile may use layers of both experts: :class:`~lorkd_monai.serving.pool.ExpertPool` exchanges
    between two batches.

    Args:
        net: the decomposition.
        task: name or index.
        state: as :func:`cut_expert_state` or :meth:`LoRKDNet.expert_state_dict` gives it.
        rank: its rank.

    Raises:
        LoRKDError: a key too many or too few, or a shape that differs.
    """
    index = net.task_index(task)
    ranks = {name: layer_rank(rank, layer.rank_factor) for name, layer in net.expert_layers.items()}
    wanted = net.expert_tensors(index)
    for name, layer in net.expert_layers.items():
        shapes = factor_shapes(layer.layer.weight.shape, ranks[name], layer.layout)
        wanted |= {
            f"{name}.{key}": torch.empty(shape, device="meta") for key, shape in zip(("lora_A", "lora_B"), shapes)
        }
    problems = misfits(wanted, state)
    if problems:
        raise LoRKDError(f"expert of task {net.tasks[index]!r} does not fit: " + "; ".join(problems))
    for name, layer in net.expert_layers.items():
        a, b = state[f"{name}.lora_A"], state[f"{name}.lora_B"]
        layer.replace_expert(index, a, b, net.layer_scale(ranks[name]))
    net._rank[net.tasks[index]] = rank
    net._view.clear()
    net.load_expert_state_dict(index, state)  # the head and norms
