"""Finding the head of a network, and making one like it for each task."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks.eks.layer_maps import LAYERS, Layer
from lorkd_monai.networks.eks.strategies import LayerOp

__all__ = ["KNOWN_HEADS", "find_heads", "head_layers", "head_like", "pooled_head_input"]

# Where MONAI's networks keep the layers whose width is the number of classes; `[-1]` is the last child. A network of
# this list is recognised by its class or a base class of it.
KNOWN_HEADS: dict[str, tuple[str, ...]] = {
    "ResNet": ("fc",),
    "DenseNet": ("class_layers.out",),
    "SENet": ("last_linear",),
    "EfficientNet": ("_fc",),
    "ViT": ("classification_head",),
    "UNet": ("model.2",),
    "AttentionUnet": ("model.2",),
    "BasicUNet": ("final_conv",),
    "BasicUNetPlusPlus": ("final_conv_0_*",),
    "FlexibleUNet": ("segmentation_head.0",),
    "DynUNet": ("output_block", "deep_supervision_heads.*"),
    "SegResNet": ("conv_final.2",),
    "SegResNetDS": ("up_layers.*.head",),
    "VNet": ("out_tr",),
    "UNETR": ("out",),
    "SwinUNETR": ("out",),
    "MedNeXt": ("out_0", "out_blocks.*"),
    "HighResNet": ("blocks[-1]",),
}

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def find_heads(network: nn.Module, head: str | Sequence[str] | None = None) -> list[str]:
    """Names of the modules that make the network's output channels: its last layer, or several (deep supervision).

    Args:
        network: the backbone.
        head: dotted name or names given by the user; None: look the class up in :data:`KNOWN_HEADS`, else take the
            last layer, if nothing with parameters comes after it.

    Raises:
        LoRKDError: a given name does not exist, or no head could be found; the message lists the candidates.
    """
    modules = dict(network.named_modules(remove_duplicate=False))
    if head is not None:
        names = [head] if isinstance(head, str) else list(head)
        wrong = [n for n in names if n not in modules or not _layers(modules[n])]
        own = next((modules[n] for n in wrong if isinstance(modules.get(n), LAYERS)), None)
        if own is not None:
            raise LoRKDError(
                f"head: {wrong[0]!r} is a {type(own).__name__} with a forward of its own, of which no other width can "
                "be made: put a plain layer of torch in its place"
            )
        if wrong or not names:
            raise LoRKDError(f"head: no layer {', '.join(map(repr, wrong)) or names} in {_describe(network)}")
        return names
    for cls in type(network).__mro__:
        if cls.__module__.startswith("monai.") and cls.__name__ in KNOWN_HEADS:
            found = [n for pattern in KNOWN_HEADS[cls.__name__] for n in _match(modules, pattern)]
            if found:
                return found
    last = [n for n, m in modules.items() if next(m.parameters(recurse=False), None) is not None][-1:]
    inside_attention = last and isinstance(modules.get(last[0].rpartition(".")[0]), nn.MultiheadAttention)
    if last and LayerOp.supports(modules[last[0]]) and not inside_attention:
        return last
    raise LoRKDError(f"head: could not tell the last layer of {_describe(network)}")


def _match(modules: dict[str, nn.Module], pattern: str) -> list[str]:
    if pattern.endswith("[-1]"):
        parent = pattern[:-4]
        children = [n for n, _ in modules[parent].named_children()] if parent in modules else []
        return [f"{parent}.{children[-1]}"] if children else []
    depth = pattern.count(".")
    return [n for n, m in modules.items() if n.count(".") == depth and fnmatchcase(n, pattern) and _layers(m)]


def _layers(module: nn.Module) -> list[Layer]:
    return [m for m in module.modules() if LayerOp.supports(m)]


def _describe(network: nn.Module) -> str:
    candidates = [n for n, m in network.named_modules() if LayerOp.supports(m)]
    shown = ", ".join(candidates[-8:]) if candidates else "none: it has no convolution or linear layer"
    return f"{type(network).__name__}. Name it with head=…; the last candidates are: {shown}"


def head_layers(head: nn.Module) -> list[Layer]:
    """The convolutions and linear layers of a head, first to last."""
    return _layers(head)


def head_channels(head: nn.Module, name: str) -> int:
    """Output channels of a head.

    Raises:
        LoRKDError: the head holds no layer.
    """
    layers = _layers(head)
    if not layers:
        raise LoRKDError(f"head {name!r} holds no convolution or linear layer")
    return _width(layers[-1])[1]


def head_like(head: nn.Module, channels: int, name: str) -> nn.Module:
    """A head of the same form with another number of output channels.

    With the same number it is a copy, weights included. Otherwise its layers start fresh: the first changes its
    output channels, those after it input and output channels, norms and PReLUs follow.

    Raises:
        LoRKDError: the head's inner widths do not follow its output channels, so that it can't be made narrower.
    """
    new = copy.deepcopy(head)
    old = head_channels(head, name)
    if channels == old:
        return new
    seen_layer = False
    for path, module in list(new.named_modules()):
        replacement = None
        if LayerOp.supports(module):
            before, after = _width(module)
            if not isinstance(module.weight, nn.Parameter):
                raise LoRKDError(
                    f"head {name!r}: the weight of its layer {path or name!r} is computed (weight norm, spectral norm, "
                    "…), and no other width can be made of it: remove that before, with "
                    "torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.remove_weight_norm"
                )
            if after != old or (seen_layer and before != old):
                raise LoRKDError(
                    f"head {name!r}: its layer {path or name!r} maps {before} to {after} channels; expected "
                    f"{'the head to keep ' if seen_layer else 'it to give '}{old} channels. Name another head=…"
                )
            replacement = _resized_layer(module, channels if seen_layer else before, channels)
            seen_layer = True
        elif isinstance(module, _NORMS) and seen_layer:
            replacement = _resized_norm(module, old, channels)
        elif isinstance(module, nn.PReLU) and module.num_parameters == old > 1 and seen_layer:
            replacement = nn.PReLU(channels, init=0.25).to(module.weight)
        elif (
            seen_layer and next(module.parameters(recurse=False), None) is not None and not isinstance(module, nn.PReLU)
        ):
            raise LoRKDError(f"head {name!r}: can't change the width of {path!r} ({type(module).__name__})")
        if replacement is not None:
            replacement.train(module.training)
            if path:
                new.set_submodule(path, replacement)
            else:
                new = replacement
    for module in new.modules():
        if getattr(module, "out_channels", None) == old and not LayerOp.supports(module):
            module.out_channels = channels  # type: ignore[assignment]
    return new


def _width(layer: Layer) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def _resized_layer(layer: Layer, before: int, after: int) -> nn.Module:
    like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype, "bias": layer.bias is not None}
    if isinstance(layer, nn.Linear):
        return nn.Linear(before, after, **like)
    geometry = {
        k: getattr(layer, k) for k in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    }
    if layer.transposed:
        geometry["output_padding"] = layer.output_padding
    base = next(c for c in type(layer).__mro__ if re.fullmatch(r"Conv(Transpose)?[123]d", c.__name__))
    return base(before, after, **geometry, **like)


def _resized_norm(norm: nn.Module, old: int, new: int) -> nn.Module | None:
    like: dict[str, Any] = {}
    weight = getattr(norm, "weight", None)
    if weight is not None:
        like = {"device": weight.device, "dtype": weight.dtype}
    if isinstance(norm, nn.modules.batchnorm._NormBase) and norm.num_features == old:
        return type(norm)(new, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, **like)
    if isinstance(norm, nn.GroupNorm) and norm.num_channels == old and norm.num_groups in (1, old):
        return nn.GroupNorm(1 if norm.num_groups == 1 else new, new, norm.eps, norm.affine, **like)
    if isinstance(norm, nn.LayerNorm) and norm.normalized_shape == (old,):
        return nn.LayerNorm(new, norm.eps, norm.elementwise_affine, **like)
    if weight is None:
        return None
    raise LoRKDError(f"head: can't change the width of {type(norm).__name__} from {old} to {new} channels")


def pooled_head_input(calls: Sequence[tuple[Tensor, int]]) -> Tensor:
    """What the main head received, pooled over space: B × F.

    The main head of several (deep supervision) is that of the highest resolution; of equal ones, the last called.

    Args:
        calls: the input of each head that was called, and the dimension that holds its channels.
    """

    def spatial(i: int) -> list[int]:
        x, channel_dim = calls[i]
        return [d for d in range(1, x.ndim) if d != channel_dim % x.ndim]

    main = max(range(len(calls)), key=lambda i: (math.prod(calls[i][0].shape[d] for d in spatial(i)), i))
    x, _ = calls[main]
    return x.mean(spatial(main)) if x.ndim > 2 else x
