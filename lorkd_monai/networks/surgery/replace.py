"""Choosing the layers of a network that get experts, and putting routed modules in their place."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from monai.bundle import ConfigParser
from torch import Tensor, nn

from lorkd_monai.errors import LoRKDError, root_cause
from lorkd_monai.networks.eks.strategies import LayerOp
from lorkd_monai.networks.low_rank import LowRankLayer
from lorkd_monai.networks.routing.module import refuse_direct_calls
from lorkd_monai.networks.spec import layer_rank
from lorkd_monai.networks.surgery.heads import find_heads, head_channels, head_layers, head_like
from lorkd_monai.networks.task_banks import HeadBank, NormBank

__all__ = [
    "build_backbone",
    "class_argument",
    "config_of_expert",
    "expert_layers",
    "insert_experts",
    "insert_heads",
    "insert_norms",
    "parsed_network",
    "replace_module",
]

_CLASS_ARGUMENTS = ("num_classes", "out_channels", "n_classes", "out_chns")
_TASK_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def build_backbone(
    backbone: nn.Module | Mapping | functools.partial, num_classes: int
) -> tuple[nn.Module, dict | None]:
    """The network to decompose and, where it was given as one, its configuration.

    Args:
        backbone: a module (copied, so that the caller's stays as it is), a MONAI config with ``_target_``, or the
            partial that a MONAI config with ``_mode_: callable`` gives.
        num_classes: output channels, where a configuration leaves them open.

    Raises:
        TypeError: something else.
        LoRKDError: a configuration that does not build a network or can't be written as JSON.
    """
    if isinstance(backbone, nn.Module):
        _refuse_lazy(backbone)
        return copy.deepcopy(backbone, detached(backbone)), None
    if isinstance(backbone, functools.partial) and not backbone.args:
        target = f"{backbone.func.__module__}.{backbone.func.__qualname__}"
        config = {"_target_": target, **backbone.keywords}
    elif isinstance(backbone, Mapping) and "_target_" in backbone:
        config = {k: v for k, v in backbone.items() if k != "_mode_"}
    else:
        raise TypeError(
            "backbone must be a torch.nn.Module or a MONAI config dict with _target_, "
            f"got {type(backbone).__name__}: {str(backbone)[:80]}"
        )
    try:
        config = json.loads(json.dumps(config))
    except (TypeError, ValueError) as e:
        raise LoRKDError(f"backbone: its configuration must consist of numbers, strings and lists: {e}") from e
    argument = class_argument(config)
    if argument is not None:
        config.setdefault(argument, num_classes)
    network = parsed_network(ConfigParser(config), "", f"backbone: {config['_target_']}")
    _refuse_lazy(network)
    return network, config


def parsed_network(parser: ConfigParser, item: str, name: str) -> nn.Module:
    """The network that an item of a MONAI config describes.

    Args:
        parser: holds the config.
        item: the id of the network in it; "" is the whole config.
        name: what the network is called in an error.

    Raises:
        LoRKDError: the item can't be built, or is no network.
    """
    try:
        network = parser.get_parsed_content(item)
    except Exception as e:
        raise LoRKDError(f"{name} could not be built: {root_cause(e)}") from e
    if not isinstance(network, nn.Module):
        raise LoRKDError(f"{name} gives a {type(network).__name__}, expected a network")
    return network


def _refuse_lazy(network: nn.Module) -> None:
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise LoRKDError(f"layer {name!r} is lazy: run the network once on an image before it is decomposed")


def detached(network: nn.Module) -> dict:
    """A deepcopy memo for the tensors with a history that some networks keep between calls (DynUNet's ``heads``)."""
    kept = [v for m in network.modules() for v in vars(m).values() if isinstance(v, (Tensor, list, tuple))]
    tensors = [t for v in kept for t in ([v] if isinstance(v, Tensor) else v) if isinstance(t, Tensor)]
    return {id(t): t.detach().clone() for t in tensors if not t.is_leaf}


def class_argument(config: Mapping) -> str | None:
    """The argument of the configured network that holds the number of output channels."""
    target = str(config["_target_"])
    module, _, name = (target if "." in target else f"monai.networks.nets.{target}").rpartition(".")
    try:
        constructor = getattr(importlib.import_module(module), name)
        parameters = inspect.signature(constructor).parameters
    except (ImportError, AttributeError, ValueError, TypeError):
        return next((a for a in _CLASS_ARGUMENTS if a in config), None)
    named = next((a for a in _CLASS_ARGUMENTS if a in config or a in parameters), None)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return named or ("num_classes" if takes_any else None)


def config_of_expert(config: Mapping, classes: int) -> dict:
    """The configured network with this number of output channels; its weights come from here, none are downloaded."""
    argument = class_argument(config)
    own = copy.deepcopy(dict(config)) | ({argument: classes} if argument else {})
    return own | {"pretrained": False} if own.get("pretrained") is True else own


def names_of(network: nn.Module, module: nn.Module) -> list[str]:
    """All names of a module in a network; several where it is shared."""
    return [n for n, m in network.named_modules(remove_duplicate=False) if m is module]


def replace_module(network: nn.Module, module: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in every place of ``network`` where ``module`` is."""
    for name in names_of(network, module):
        network.set_submodule(name, new)


def expert_layers(
    network: nn.Module, heads: Sequence[str], include: Sequence[str] | None, exclude: Sequence[str] | None
) -> dict[str, nn.Module]:
    """The layers that get experts, by name.

    By default all convolutions, transposed convolutions and linear layers outside the heads, but for depthwise
    convolutions, which stay shared as in the papers (name them in ``include`` to give them experts). What computes
    with its weight in a way of its own stays shared in any case: the projections inside ``nn.MultiheadAttention``, and
    subclasses of torch's layers with a forward of their own (standardised, quantised, LoRA-like).

    Raises:
        LoRKDError: a pattern that matches nothing, an ``include`` that names only layers which can't have experts, or
            a layer whose weight is shared or re-parametrised (weight norm, spectral norm), or that has a forward hook.
    """
    modules = dict(network.named_modules())
    inside = [f"{n}." for n in heads] + [f"{n}." for n, m in modules.items() if isinstance(m, nn.MultiheadAttention)]
    able = [n for n, m in modules.items() if LayerOp.supports(m) and n not in heads and not n.startswith(tuple(inside))]
    chosen = {}
    for name in able:
        module = modules[name]
        depthwise = getattr(module, "groups", 1) > 1 and module.groups == module.in_channels
        if (any(fnmatchcase(name, p) for p in include) if include is not None else not depthwise) and not any(
            fnmatchcase(name, p) for p in exclude or ()
        ):
            chosen[name] = module
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            if not any(fnmatchcase(n, pattern) for n in modules):
                raise LoRKDError(f"{argument}: {pattern!r} matches no layer of {type(network).__name__}")
    for pattern in include or ():
        if not any(fnmatchcase(n, pattern) for n in able):
            named = next(n for n in modules if fnmatchcase(n, pattern))
            kind = "the head" if named in heads else f"a {type(modules[named]).__name__}"
            raise LoRKDError(
                f"include: {pattern!r} matches no layer that can have experts: {named!r} is {kind}. Convolutions and "
                "linear layers with torch's own forward can, outside the head and nn.MultiheadAttention"
            )
    for name, module in chosen.items():
        _refuse_changed_weight(network, name, module)
    return chosen


def _refuse_changed_weight(network: nn.Module, name: str, layer: nn.Module) -> None:
    reasons = []
    if nn.utils.parametrize.is_parametrized(layer):
        reasons.append("has a parametrization (weight norm, spectral norm, …)")
    elif layer._forward_pre_hooks or layer._forward_hooks:
        reasons.append("has forward hooks (weight norm, spectral norm, …)")
    elif not isinstance(layer.weight, nn.Parameter):
        reasons.append("has a weight that is no parameter")
    for other, module in network.named_modules():
        if module is not layer and any(p is layer.weight for p in module.parameters(recurse=False)):
            reasons.append(f"shares its weight with {other!r}")
    if reasons:
        raise LoRKDError(
            f"layer {name!r} {' and '.join(reasons)}: its weight can't follow a task. Remove that, or leave the layer "
            f"shared with exclude=[{name!r}]"
        )


def insert_experts(
    network: nn.Module,
    heads: Sequence[str],
    ranks: Sequence[int],
    options: Mapping[str, Any],
    layer_scale: Callable[[int], float],
) -> dict[str, LowRankLayer]:
    """Replace each layer that gets experts; none where all ranks are 0.

    Args:
        network: changed in place.
        heads: names of its heads.
        ranks: of each task.
        options: ``include``, ``exclude``, ``rank_pattern`` and ``layout`` of the decomposition.
        layer_scale: rank in a layer -> factor of ΔW.

    Returns:
        The new layers by name.

    Raises:
        LoRKDError: see :func:`expert_layers`; no layer is left, or a ``rank_pattern`` matches none.
    """
    layers = expert_layers(network, heads, options["include"], options["exclude"])
    if not any(ranks):
        return {}
    if not layers:
        raise LoRKDError("no layer gets an expert: include and exclude leave none of the backbone's layers")
    for pattern in options["rank_pattern"]:
        if not any(fnmatchcase(n, pattern) for n in layers):
            raise LoRKDError(f"rank_pattern: {pattern!r} matches no layer that gets experts")
    wrapped = {}
    for name, layer in layers.items():
        factor = next((f for p, f in options["rank_pattern"].items() if fnmatchcase(name, p)), 1.0)
        own = [layer_rank(rank, factor) for rank in ranks]
        wrapped[name] = LowRankLayer(layer, own, [layer_scale(r) for r in own], options["layout"], name, factor)
        replace_module(network, layer, wrapped[name])
    return wrapped


def insert_heads(
    network: nn.Module, head: str | Sequence[str] | None, num_classes: Sequence[int]
) -> tuple[dict[str, HeadBank], int]:
    """Replace each head by one head for each task; the banks by name, and the output channels it had before."""
    names = find_heads(network, head)
    modules = dict(network.named_modules(remove_duplicate=False))
    banks: dict[str, HeadBank] = {}
    replaced: set[int] = set()
    widths = {head_channels(modules[n], n) for n in names}
    if len(widths) > 1:
        raise LoRKDError(f"head: the layers {', '.join(names)} differ in output channels: {sorted(widths)}")
    for name in names:
        module = modules[name]
        if id(module) in replaced:
            continue
        replaced.add(id(module))
        if name == "":
            raise LoRKDError("backbone is a single layer: expected a network with a head of its own")
        heads = [head_like(module, n, name) for n in num_classes]
        linear = isinstance(head_layers(module)[-1], nn.Linear)
        banks[name] = HeadBank(heads, num_classes, channel_dim=-1 if linear else 1, name=name)
        replace_module(network, module, banks[name])
        refuse_direct_calls(module, f"head {name!r}")
    return banks, widths.pop()


def insert_norms(network: nn.Module, heads: Sequence[str], num_tasks: int) -> dict[str, NormBank]:
    """Replace each batch or instance norm that has parameters or statistics by one for each task."""
    banks = {}
    for name, module in list(network.named_modules()):
        if any(name == h or name.startswith(f"{h}.") for h in heads) or not isinstance(module, _TASK_NORMS):
            continue
        if isinstance(module, nn.SyncBatchNorm):
            raise LoRKDError(
                f"norm='task': {name!r} is a SyncBatchNorm, which waits for all processes while their tasks differ"
            )
        if module.affine or module.track_running_stats:
            banks[name] = NormBank([copy.deepcopy(module) for _ in range(num_tasks)], name)
            replace_module(network, module, banks[name])
            refuse_direct_calls(module, f"norm {name!r}")
    return banks
