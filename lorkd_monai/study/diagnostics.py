"""What a trained student shows of its tasks: how their gradients conflict, and what each expert adds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lorkd_monai.data import DataList
from lorkd_monai.engines import make_objective
from lorkd_monai.experts.choose_ranks import expert_spectrum
from lorkd_monai.networks import LoRKDNet

__all__ = ["gradient_conflict", "spectra"]


def gradient_conflict(
    network: LoRKDNet, data: DataList, dataset: Dataset, images: int = 64, batch: int = 16, seed: int = 0
) -> dict[str, Any]:
    """Cosines between the tasks' gradients of the task loss with respect to the weights that all tasks share.

    A cosine below 0 means that a step for one task undoes part of a step for the other. Norms are in evaluation mode,
    so that the gradient of a task depends on its own images alone; the images are training images without augmentation.

    Args:
        network: a decomposition, or a student with heads only.
        data: its data list.
        dataset: its training images, with ``task_of_item``.
        images: of each task.
        batch: images of one pass.
        seed: of the choice of images.

    Returns:
        ``tasks``, ``cosines`` (T × T), ``norms`` (of each task's gradient) and ``by_layer`` ({layer: mean cosine over
        pairs of tasks}).
    """
    mode = network.training
    network.eval()
    device = next(network.parameters()).device
    own = {id(p) for i in range(len(network.tasks)) for p in network.expert_tensors(i).values()}
    shared = {n: p for n, p in network.backbone.named_parameters() if id(p) not in own and p.requires_grad}
    objective = make_objective(network, None, data, dataset, 0.0)
    generator = torch.Generator().manual_seed(seed)
    gradients: list[dict[str, Tensor]] = []
    for index in range(len(network.tasks)):
        labelled = getattr(dataset, "labelled", [True] * len(dataset))
        items = [i for i, t in enumerate(dataset.task_of_item) if t == index and labelled[i]]
        order = torch.randperm(len(items), generator=generator).tolist()[:images]
        total = {name: torch.zeros_like(p) for name, p in shared.items()}
        for start in range(0, len(order), batch):
            rows = [dataset[items[i]] for i in order[start : start + batch]]
            image, label = (torch.stack([row[key] for row in rows]).to(device) for key in ("image", "label"))
            task = torch.full((len(rows),), index, dtype=torch.long, device=device)
            # Features are asked for so that the network routes, and does not serve a copy without gradients.
            loss = objective(network(image, task, return_features=True)[0], label, task)
            found = torch.autograd.grad(loss, list(shared.values()), allow_unused=True)
            for (name, _), gradient in zip(shared.items(), found, strict=True):
                if gradient is not None:
                    total[name] += gradient * (len(rows) / len(order))
        gradients.append({name: g.double().flatten() for name, g in total.items()})
    network.train(mode)
    whole = torch.stack([torch.cat(list(g.values())) for g in gradients])
    by_layer = {}
    for name in shared:
        if name.endswith("weight") and shared[name].ndim > 1:
            cosines = _cosines(torch.stack([g[name] for g in gradients]))
            pairs = cosines[torch.triu(torch.ones_like(cosines), 1).bool()]
            by_layer[name.replace(".layer.weight", ".weight")] = float(pairs.mean()) if len(pairs) else 0.0
    return {
        "tasks": network.tasks,
        "cosines": _cosines(whole).tolist(),
        "norms": whole.norm(dim=1).tolist(),
        "by_layer": by_layer,
    }


def _cosines(rows: Tensor) -> Tensor:
    unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return unit @ unit.T


@torch.no_grad()
def spectra(network: LoRKDNet) -> dict[str, Any]:
    """Singular values of each expert's ΔW in each layer, and the size of ΔW beside that of W0 (Frobenius norms)."""
    result: dict[str, Any] = {}
    for name in network.tasks:
        index = network.task_index(name)
        rows = {}
        for layer, values in expert_spectrum(network, name).items():
            wrapped = network.expert_layers[layer]
            weight = wrapped.layer.weight
            change = (wrapped.fused_weight(index) - weight).norm() / weight.norm().clamp_min(1e-30)
            rows[layer] = {
                "values": [round(float(v), 6) for v in values[values > 1e-9]],
                "relative_size": round(float(change), 6),
            }
        result[name] = rows
    return result
