"""The tasks and layers of a decomposition, with their sizes, as plain data."""

from __future__ import annotations

from typing import Any

from lorkd_monai.networks.lorkd_net import LoRKDNet

__all__ = ["describe_layers", "describe_tasks"]


def describe_tasks(net: LoRKDNet) -> dict[str, Any]:
    """The tasks of a decomposition with their classes, ranks and sizes (parameters), as JSON-able data.

    ``fused_parameters`` are those of the plain network that :meth:`LoRKDNet.extract` gives.
    """
    spec = net.spec()
    described = spec["info"].get("tasks", {})
    own = {name: sum(t.numel() for t in net.expert_state_dict(name).values()) for name in net.tasks}
    shared = sum(p.numel() for p in net.parameters()) - sum(own.values())
    layers = describe_layers(net)
    tasks = {}
    for name, classes in net.num_classes.items():
        fields = described.get(name, {})
        factors = sum(layer["expert_parameters"][name] for layer in layers)
        tasks[name] = {
            "num_classes": classes,
            "classes": [text for _, text in sorted((int(k), v) for k, v in fields.get("labels", {}).items())],
            "modality": fields.get("modality"),
            "rank": spec["rank"][name],
            "expert_parameters": factors,
            "head_and_norm_parameters": own[name] - factors,
            "fused_parameters": shared + own[name] - factors,
        }
    return {
        "kind": spec["info"].get("kind"),
        "spatial_dims": spec["info"].get("spatial_dims"),
        "backbone": (spec["backbone"] or {}).get("_target_", type(net.backbone).__name__),
        "layout": spec["layout"],
        "norm": spec["norm"],
        "alpha": spec["alpha"],
        "scale": spec["scale"],
        "shared_parameters": shared,
        "tasks": tasks,
    }


def describe_layers(net: LoRKDNet) -> list[dict[str, Any]]:
    """The layers with experts: name, type, shape of the weight, rank and parameters of each task's expert."""
    rows = []
    for name, layer in net.expert_layers.items():
        weight = layer.layer.weight
        experts = [a.numel() + b.numel() for a, b in zip(layer.lora_A, layer.lora_B, strict=True)]
        rows.append(
            {
                "layer": name,
                "type": type(layer.layer).__name__,
                "weight": list(weight.shape),
                "parameters": weight.numel(),
                "ranks": dict(zip(net.tasks, layer.ranks, strict=True)),
                "expert_parameters": dict(zip(net.tasks, experts, strict=True)),
            }
        )
    return rows
