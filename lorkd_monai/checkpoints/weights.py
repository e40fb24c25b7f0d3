"""Reading and writing weights safely, and building a decomposition from its checkpoint."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lorkd_monai.errors import LoRKDError, first_line
from lorkd_monai.files import atomic_file
from lorkd_monai.networks.lorkd_net import LoRKDNet
from lorkd_monai.networks.spec import SPEC_KEY, misfits, read_spec

__all__ = [
    "fit_weights",
    "hash_tensors",
    "load_decomposition",
    "load_weights",
    "read_decomposition_spec",
    "save_weights",
    "tensor_bytes",
]

# Where trainers put the state dict of the network inside a checkpoint, in the order they are looked for.
_NESTED = ("model", "state_dict", "network", "net", "model_state_dict")
_NETS = "monai.networks.nets"


def load_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU; only tensors are ever unpickled.

    Args:
        path: a ``.safetensors`` file, or what ``torch.save`` wrote: a state dict, or a checkpoint that holds one under
            ``model``, ``state_dict``, ``network``, ``net`` or ``model_state_dict``. The prefix ``module.`` that
            distributed training puts before every key is removed.

    Raises:
        LoRKDError: no such file, a truncated or foreign file, a pickle of other objects, or no state dict in it.
    """
    path = Path(path)
    if not path.is_file():
        raise LoRKDError(f"no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    # What torch.load raises on a damaged file depends on where the damage is.
    except Exception as e:
        if isinstance(e, pickle.UnpicklingError) and ("weights_only" in str(e) or "weights only" in str(e).lower()):
            raise LoRKDError(
                f"{path} holds Python objects that are not tensors, and loading them could run code. Save the "
                "network's state_dict() instead"
            ) from e
        raise LoRKDError(
            f"{path} is not a complete weights file; it may be truncated, or another kind of file: {first_line(e)}"
        ) from e
    nested = [content[key] for key in _NESTED if key in content] if isinstance(content, Mapping) else []
    state = next((dict(found) for found in [content, *nested] if _is_state_dict(found) and found), None)
    if state is None:
        raise LoRKDError(
            f"{path} holds no state dict: expected names with tensors, at the top or under {', '.join(_NESTED)}; got "
            f"{_describe(content)}"
        )
    if all(k.startswith("module.") for k in state):
        state = {k[len("module.") :]: v for k, v in state.items()}
    return state


def _is_state_dict(content: object) -> bool:
    return isinstance(content, Mapping) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    )


def _describe(content: object) -> str:
    if isinstance(content, Mapping):
        return f"a dict with the keys {', '.join(map(repr, list(content)[:5])) or '(none)'}"
    return f"a {type(content).__name__}"


def save_weights(path: str | os.PathLike, state: Mapping[str, Tensor]) -> None:
    """Write a flat state dict as ``.safetensors`` or, under any other suffix, with ``torch.save``.

    The file is written completely or not at all.

    Raises:
        LoRKDError: ``state`` is not a state dict, or the folder does not exist.
    """
    path = Path(path)
    if not _is_state_dict(state):
        raise LoRKDError(f"expected a state dict, names with tensors, to save in {path}, got {_describe(state)}")
    if not path.parent.is_dir():
        raise LoRKDError(f"the folder of {path} does not exist: make it first")
    state = {k: v.detach().cpu() for k, v in state.items()}
    with atomic_file(path) as temporary:
        if path.suffix == ".safetensors":
            # safetensors refuses tensors that share memory (tied weights): each gets its own.
            safetensors.torch.save_file({k: v.contiguous().clone() for k, v in state.items()}, temporary)
        else:
            torch.save(state, temporary)


def fit_weights(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load ``state`` strictly into ``network``, which stays unchanged if it does not fit.

    Args:
        network: the network.
        state: a state dict.
        source: what ``state`` is, for the message.

    Raises:
        LoRKDError: keys missing or unknown, or shapes that differ; the first of each are listed.
    """
    problems = misfits({k: v for k, v in network.state_dict().items() if isinstance(v, Tensor)}, state)
    if problems:
        raise LoRKDError(f"{source} does not fit the network {type(network).__name__}: {'; '.join(problems)}")
    network.load_state_dict(dict(state))


def read_decomposition_spec(state: Mapping[str, Tensor], source: str = "the checkpoint") -> dict:
    """The spec in the state dict of a `LoRKDNet`.

    Raises:
        LoRKDError: there is none, or it is not one.
    """
    if SPEC_KEY not in state:
        raise LoRKDError(
            f"{source} holds no decomposition: it lacks the key {SPEC_KEY!r} that the state dict of a LoRKDNet has"
        )
    spec = read_spec(state[SPEC_KEY])
    if not isinstance(spec, dict) or not isinstance(spec.get("tasks"), dict):
        raise LoRKDError(f"{source}: its description of the decomposition names no tasks")
    return spec


def load_decomposition(path: str | os.PathLike, backbone: nn.Module | Mapping | None = None) -> LoRKDNet:
    """Build the decomposition that a checkpoint holds, and load it.

    Args:
        path: a checkpoint, see :func:`load_weights`.
        backbone: the backbone, or its config. Needed if the decomposition was made from a network object, or from a
            config of a network that is not MONAI's: a weights file must not name other code to run.

    Raises:
        LoRKDError: no decomposition in the file, no backbone, or one that does not fit the checkpoint.
    """
    state = load_weights(path)
    spec = read_decomposition_spec(state, str(path))
    if backbone is None:
        check_backbone(spec, str(path))
        if isinstance(spec["backbone"], dict) and spec["backbone"].get("pretrained") is True:
            spec["backbone"]["pretrained"] = False  # the weights are in the checkpoint
    try:
        net = LoRKDNet.from_spec(spec, backbone)
    except (TypeError, KeyError) as e:
        raise LoRKDError(f"{path}: the decomposition it describes can't be built: {first_line(e)}") from e
    fit_weights(net, state, str(path))
    return net


def check_backbone(spec: Mapping, source: str) -> None:
    """Refuse a spec, read from a weights file, whose backbone can't be built from the file alone.

    Raises:
        LoRKDError: it has no config of the backbone, or one that :func:`check_inert_config` refuses.
    """
    if spec.get("backbone") is None:
        raise LoRKDError(f"{source} was made from a network object: give that backbone, or a config of it")
    check_inert_config(spec["backbone"], source)


def check_inert_config(config: object, source: str) -> None:
    """Refuse a network config, read from a weights file, that could do anything but build one of MONAI's networks.

    Raises:
        LoRKDError: an expression, a reference, a special key, or a ``_target_`` outside of MONAI's networks.
    """
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key == "_target_":
                _check_target(value, source)
            elif str(key).startswith("_"):
                raise LoRKDError(f"{source}: its backbone's config has the key {key!r}. Give the backbone yourself")
            else:
                check_inert_config(value, source)
    elif isinstance(config, list):
        for value in config:
            check_inert_config(value, source)
    elif isinstance(config, str) and config.lstrip()[:1] in ("$", "@", "%"):
        raise LoRKDError(
            f"{source}: its backbone's config holds the expression {config[:40]!r}. Give the backbone yourself"
        )


def _check_target(target: Any, source: str) -> None:
    module, _, name = (target if "." in str(target) else f"{_NETS}.{target}").rpartition(".")
    if module == _NETS or module.startswith(f"{_NETS}."):
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError:
            found = None
        builds = inspect.isfunction(found) or (inspect.isclass(found) and issubclass(found, nn.Module))
        if builds and found.__module__.startswith(_NETS):
            return
    raise LoRKDError(
        f"{source} names {str(target)[:80]!r} as its backbone, which is not a network of MONAI's: give the "
        "backbone, or its config, yourself"
    )


def tensor_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor's values, in their order."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def hash_tensors(about: object, tensors: Mapping[str, object]) -> str:
    """A SHA-256 of ``about``, as JSON, and of tensors: their names, types, shapes and values."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
