"""Choose a rank for each task from the spectrum of what fine-tuning changes; spectra of experts."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks.eks.factors import factor_shapes
from lorkd_monai.networks.lorkd_net import LoRKDNet
from lorkd_monai.networks.spec import layer_rank

__all__ = ["expert_spectrum", "suggest_ranks", "update_spectrum"]


def update_spectrum(update: Tensor, layout: str = "lorkd") -> Tensor:
    """Singular values, largest first, of a weight's change ΔW in the matrix form in which B_t A_t makes it.

    Args:
        update: ΔW, of the weight's shape (o, i, k0, k1, …).
        layout: ``"lorkd"``: ΔW as (o·k0) × (i·k1·…), of which an expert of rank r can hold r·k0 singular values;
            ``"conv"``: as o × (i·k0·k1·…), of which it can hold r.
    """
    (_, columns), (rows, _) = factor_shapes(update.shape, 1, layout)
    return torch.linalg.svdvals(update.detach().double().reshape(rows, columns))


@torch.no_grad()
def expert_spectrum(net: LoRKDNet, task: str | int) -> dict[str, Tensor]:
    """Singular values, largest first, of a task's ΔW = scale · B A in each layer; as many as the factors' inner size.

    Raises:
        LoRKDError: unknown task.
    """
    index = net.task_index(task)
    spectra = {}
    for name, layer in net.expert_layers.items():
        a, b = layer.lora_A[index].double(), layer.lora_B[index].double()
        # B A = Q_b (R_b R_aᵀ) Q_aᵀ with orthonormal Q: a small matrix has the same singular values.
        small = torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.T, mode="r").R.T
        spectra[name] = torch.linalg.svdvals(small * layer.scales[index])
    return spectra


@torch.no_grad()
def suggest_ranks(
    net: LoRKDNet,
    tuned: Mapping[str, Mapping[str, Tensor]],
    budget: int | None = None,
    base: Mapping[str, Tensor] | None = None,
) -> list[dict]:
    """Propose a rank for each task within a budget of parameters, from the spectrum of each task's full update.

    The full update of a task is ΔW = W − W0 in every layer that gets an expert; W are the weights of a copy of the
    backbone that was fine-tuned on this task alone. An expert of rank r can hold the first singular values of ΔW. The
    energy it keeps is Σ σ² over those, as a share of the sum over all, in all layers. Each step raises the rank
    of the task whose energy grows most per parameter, as long as the budget allows. (Ranks that differ by task come
    from arXiv 2409.19540; this rule is ours.)

    Args:
        net: a decomposition of the backbone, for its layers, layout and ``rank_pattern``; it may be fresh.
        tuned: task -> state dict of the fine-tuned backbone, or of W0 plus accumulated full-rank updates.
        budget: parameters of all experts together; None: as many as in ``net``.
        base: W0's state dict; None: the shared weights of ``net``.

    Returns:
        One row for each task: ``task``, ``rank``, ``parameters``, ``energy`` (0 to 1), and for comparison
        ``equal_rank``, ``equal_parameters`` and ``equal_energy``: the same with equal ranks within the budget.

    Raises:
        LoRKDError: ``tuned`` does not hold exactly the tasks, a layer is missing or has another shape, a task's
            weights were not changed at all, or the budget is too small for rank 1 everywhere.
    """
    if set(tuned) != set(net.tasks):
        raise LoRKDError(f"tuned holds the tasks {', '.join(tuned) or '(none)'}; expected {', '.join(net.tasks)}")
    if not any(layer.rank_factor > 0 for layer in net.expert_layers.values()):
        raise LoRKDError("this network has no layers with experts whose rank can be chosen")
    energies = {task: _cumulative_energies(net, task, tuned[task], base) for task in net.tasks}

    def shapes(layer: str, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of A and B in a layer where the task has this rank."""
        module = net.expert_layers[layer]
        return factor_shapes(module.layer.weight.shape, layer_rank(rank, module.rank_factor), net.layout)

    @functools.cache
    def cost(rank: int) -> int:
        return sum(math.prod(shape) for name in net.expert_layers for shape in shapes(name, rank))

    @functools.cache
    def energy(task: str, rank: int) -> float:
        return sum(float(kept[min(shapes(name, rank)[0][0], len(kept)) - 1]) for name, kept in energies[task].items())

    def larger(rank: int) -> int:
        """The next rank that takes more parameters: not each does where ``rank_pattern`` makes ranks smaller."""
        return next(k for k in itertools.count(rank + 1) if cost(k) > cost(rank))

    if budget is None:
        budget = sum(p.numel() for n, p in net.named_parameters() if ".lora_A." in n or ".lora_B." in n)
    ranks = dict.fromkeys(net.tasks, 1)
    left = budget - cost(1) * len(ranks)
    if left < 0:
        raise LoRKDError(
            f"a budget of {budget} parameters is too small: rank 1 for {len(ranks)} tasks takes {cost(1) * len(ranks)}"
        )
    equal = 1
    while cost(k := larger(equal)) * len(ranks) <= budget and any(energy(t, k) > energy(t, equal) for t in ranks):
        equal = k
    while True:
        steps = [
            ((energy(t, k) - energy(t, r)) / extra, t, extra)
            for t, r in ranks.items()
            if (extra := cost(k := larger(r)) - cost(r)) <= left
        ]
        gain, task, extra = max(steps, default=(0.0, "", 0), key=lambda step: step[0])
        if gain <= 1e-15:
            break
        ranks[task] = larger(ranks[task])
        left -= extra
    return [
        {
            "task": t,
            "rank": r,
            "parameters": cost(r),
            "energy": energy(t, r),
            "equal_rank": equal,
            "equal_parameters": cost(equal),
            "equal_energy": energy(t, equal),
        }
        for t, r in ranks.items()
    ]


def _cumulative_energies(
    net: LoRKDNet, task: str, tuned: Mapping[str, Tensor], base: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """For each layer Σ σ² over the first 1, 2, … singular values, as a share of the task's whole update."""
    cumulative = {}
    for name, layer in net.expert_layers.items():
        key = f"{name}.weight"
        own = layer.layer.weight if base is None else base.get(key)
        new = tuned.get(key)
        if own is None or new is None or new.shape != own.shape:
            came = "is missing" if own is None or new is None else f"is {tuple(new.shape)}, not {tuple(own.shape)}"
            raise LoRKDError(f"task {task!r}: the weight {key!r} {came}; give the state dicts of this backbone")
        cumulative[name] = update_spectrum(new.cpu().double() - own.cpu().double(), net.layout).square().cumsum(0)
    total = sum(float(c[-1]) for c in cumulative.values())
    if not total > 0 or total == float("inf"):
        raise LoRKDError(f"task {task!r}: its weights do not differ from the backbone's, or are not finite")
    return {n: c / total for n, c in cumulative.items()}
