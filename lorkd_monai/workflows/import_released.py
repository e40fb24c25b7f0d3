"""Import a checkpoint file of the released LoRKD code."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from lorkd_monai.bundle.export import network_info
from lorkd_monai.checkpoints.released_code import ImportReport, import_authors
from lorkd_monai.checkpoints.weights import load_weights, save_weights
from lorkd_monai.data import load_data_list
from lorkd_monai.errors import LoRKDError, first_line
from lorkd_monai.files import atomic_file
from lorkd_monai.networks import LoRKDNet
from lorkd_monai.networks.surgery import replace

__all__ = ["import_file", "read_backbone", "read_config"]

_EXTRAS = {"dynamic_network_architectures": ("nnunet", "dynamic-network-architectures")}


def read_config(file: Path, what: str) -> dict[str, Any]:
    """Read a JSON or YAML file that holds one mapping.

    Raises:
        LoRKDError: the file can't be read, or holds something else.
    """
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise LoRKDError(f"{what}: {file} can't be read as JSON or YAML: {first_line(e)}") from e
    if not isinstance(content, dict):
        raise LoRKDError(f"{what}: {file} must hold a mapping, got a {type(content).__name__}")
    return content


def read_backbone(file: Path) -> dict[str, Any]:
    """Read the config of a network, at the top of a JSON or YAML file or under ``network_def``.

    Raises:
        LoRKDError: the file can't be read or has no ``_target_``, or the network's package is not installed.
    """
    config = read_config(file, "backbone")
    config = config.get("network_def", config)
    if not isinstance(config, dict) or not isinstance(config.get("_target_"), str):
        raise LoRKDError(f"backbone: {file} must hold a MONAI config with _target_, at the top or under network_def")
    package = config["_target_"].partition(".")[0]
    if package in _EXTRAS and importlib.util.find_spec(package) is None:
        extra, name = _EXTRAS[package]
        raise LoRKDError(f"backbone: {config['_target_']} needs the package {name}: pip install 'lorkd-monai[{extra}]'")
    return config


def import_file(
    checkpoint: Path,
    backbone: Path,
    tasks: Sequence[str],
    output: Path,
    *,
    mapping: str | Path | None = None,
    dataset_dir: str | Path | None = None,
    kind: str | None = None,
    image_size: Any = None,
    report: Path | None = None,
    **options: Any,
) -> tuple[LoRKDNet, ImportReport]:
    """Import a checkpoint with `import_authors`, and write the decomposition's state dict to ``output``.

    Args:
        checkpoint: file with the state dict.
        backbone: file with the network's config, see :func:`read_backbone`.
        tasks: their names, each as "name" or "name=classes".
        output: file to write, in full or not at all.
        mapping: file with the mapping of keys.
        dataset_dir: data list of the tasks; the new checkpoint then holds what `lorkd export` needs.
        kind: of the data list; needed with ``dataset_dir``.
        image_size: size of the images or patches; needed with ``dataset_dir``.
        report: JSON file to write, with the lists of the `ImportReport`.
        options: more options of `import_authors`.

    Raises:
        LoRKDError: see `import_authors`; or the data list has other tasks. Nothing is written then.
    """
    config = read_backbone(backbone)
    names = _tasks(tasks)
    info = _info(config, list(names), dataset_dir, kind, image_size)
    rules = None if mapping is None else read_config(Path(mapping), "mapping")
    net, found = import_authors(load_weights(checkpoint), config, names, mapping=rules, info=info, **options)
    save_weights(output, net.state_dict())
    if report is not None:
        with atomic_file(report) as file:
            file.write_text(json.dumps(dataclasses.asdict(found), indent=2) + "\n", encoding="utf-8")
    return net, found


def _tasks(tasks: Sequence[str]) -> list[str] | dict[str, int]:
    pairs = [name.partition("=") for name in tasks]
    if not any(sign for _, sign, _ in pairs):
        return list(tasks)
    wrong = [name for name, _, classes in pairs if not classes.strip().isdigit()]
    if wrong:
        raise LoRKDError(f"tasks: expected name=classes for every task, {wrong[0]!r} has no number of classes")
    return {name.strip(): int(classes) for name, _, classes in pairs}


def _info(
    config: dict[str, Any], tasks: Sequence[str], dataset_dir: str | Path | None, kind: str | None, image_size: Any
) -> dict[str, Any] | None:
    if dataset_dir is None:
        return None
    if kind is None or image_size is None:
        raise LoRKDError("dataset_dir: give kind (classification or segmentation) and image_size with it")
    network, _ = replace.build_backbone(config, 2)
    first = next((m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), None)
    if first is None:
        raise LoRKDError(f"dataset_dir: {config['_target_']} has no convolution to read the number of channels from")
    data = load_data_list(dataset_dir, kind, len(first.kernel_size))
    if list(data.tasks) != list(tasks):
        raise LoRKDError(f"tasks: the data list has {', '.join(data.tasks)}, in this order; got {', '.join(tasks)}")
    return network_info(data, first.in_channels, image_size)
