"""From a decomposed network to one expert bundle for each task."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from lorkd_monai.bundle.writer import check_formats, expert_folder, refuse_foreign, write_expert_bundle
from lorkd_monai.checkpoints.weights import load_weights
from lorkd_monai.data import DataList
from lorkd_monai.data.identity import differences, split_digests
from lorkd_monai.errors import LoRKDError
from lorkd_monai.files import read_json
from lorkd_monai.networks import LoRKDNet
from lorkd_monai.networks.spec import cut_rank
from lorkd_monai.tasks import TaskSpec, Work

__all__ = ["describe_expert", "expert_folders", "export_experts", "network_info", "read_figures", "work_of_info"]

_STATISTICS = ("running_mean", "running_var")  # of norms: no parameters
_log = logging.getLogger(__name__)


def network_info(data: DataList, in_channels: int, image_size: int | Sequence[int]) -> dict[str, Any]:
    """What an export needs to know besides the network, as plain JSON data for ``LoRKDNet(info=…)``.

    Args:
        data: the data list that the network is trained on.
        in_channels: channels of the network's input.
        image_size: size of its images, or of its patches and windows, in voxels.
    """
    return {
        "data": data.name,
        "kind": data.kind,
        "spatial_dims": data.spatial_dims,
        "in_channels": in_channels,
        "image_size": image_size if isinstance(image_size, int) else list(image_size),
        "tasks": {name: asdict(task) for name, task in data.tasks.items()},
        "images": split_digests(data),
    }


def work_of_info(info: Mapping[str, Any]) -> Work:
    """The work that :func:`network_info` wrote down.

    Raises:
        LoRKDError: ``info`` is not what it wrote.
    """
    try:
        tasks = {}
        for name, fields in info["tasks"].items():
            fields = {**fields, "labels": {int(k): v for k, v in fields["labels"].items()}}
            if fields.get("spacing") is not None:
                fields["spacing"] = tuple(fields["spacing"])
            tasks[name] = TaskSpec(**fields)
        return Work(info["kind"], info["spatial_dims"], info["in_channels"], info["image_size"], tasks)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise LoRKDError(
            f"the decomposition does not say what its tasks are ({type(e).__name__}: {e}): expected a checkpoint of "
            "`training`, or a network with info=network_info(…)"
        ) from e


def read_figures(path: str | Path, info: Mapping[str, Any]) -> dict[str, Any]:
    """The experts' metrics in a JSON file of `training` or `evaluating`, by task.

    Args:
        path: the file.
        info: of the decomposition that they are said to be of.

    Raises:
        LoRKDError: no JSON object, or metrics of tasks with other classes.
    """
    content = read_json(path)
    specs = work_of_info(info).tasks
    now = {name: {"classes": list(task.labels.values())} for name, task in specs.items()}
    told = content.get("data", {}).get("tasks", {}) if "experts" in content else {}
    before = {name: {"classes": told[name]["classes"]} for name in now if name in told}
    differing = differences(before, {name: now[name] for name in before})
    if differing:
        raise LoRKDError(
            f"{path} holds metrics of other classes than this decomposition's: {'; '.join(differing)}. Name the file "
            "that `evaluating` wrote for it"
        )
    return content.get("experts", content)


def expert_folders(
    folder: str | os.PathLike, tasks: Sequence[str], info: Mapping[str, Any], overwrite: bool
) -> dict[str, Path]:
    """Where the expert bundles of these tasks go, see `expert_folder`.

    Raises:
        LoRKDError: one is there already and may not be replaced, or two tasks would have one name.
    """
    folders = {name: expert_folder(folder, name, info["kind"], info["spatial_dims"]) for name in tasks}
    if len(set(folders.values())) < len(folders):
        raise LoRKDError(f"two of the tasks {', '.join(folders)} would have one folder in {folder}: name another one")
    existing = [path for path in folders.values() if path.exists()]
    if existing and not overwrite:
        raise LoRKDError(
            f"{folder} already holds the experts {', '.join(path.name for path in existing)}: give another "
            "--output_dir, or say --overwrite True to replace them"
        )
    for path in existing:
        refuse_foreign(path)
    return folders


def export_experts(
    network: LoRKDNet,
    folder: str | os.PathLike,
    tasks: Sequence[str] | None = None,
    figures: Mapping[str, Mapping[str, Any]] | None = None,
    parent: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    formats: Sequence[str] | None = None,
    networks: Mapping[str, nn.Module] | None = None,
    rank: int | None = None,
) -> list[Path]:
    """Write one complete MONAI bundle for each task: ``<folder>/<task>_classification`` or ``…_segmentation``.

    Where ``folder`` has the 3D expert of a task already, its 2D one is ``<task>_2d_…``, and the other way round.

    Args:
        network: the decomposed network, built from a backbone configuration, with :func:`network_info` as its info.
        folder: where the bundles go.
        tasks: which tasks; None: all.
        figures: measured metrics of each task, for the bundles' README and metadata.
        parent: facts on the decomposition for the README, see `write_expert_bundle`.
        overwrite: replace bundles that exist.
        formats: file formats of the weights, see `write_expert_bundle`.
        networks: extracted networks of tasks to write in place of what ``network`` gives now.
        rank: cut nested experts to at most this rank, see `LoRKDNet.extract`.

    Returns:
        The bundles' folders.

    Raises:
        LoRKDError: an unknown task, a network without configuration or info, bundles that exist already, experts that
            can't be cut.
    """
    info, work = network.info, work_of_info(network.info)
    specs = work.tasks
    chosen = [network.tasks[network.task_index(t)] for t in tasks] if tasks is not None else network.tasks
    unknown = [name for name in chosen if name not in specs]
    if unknown:
        raise LoRKDError(
            f"the decomposition does not describe the task {unknown[0]!r}; it describes {', '.join(specs)}"
        )
    if rank is not None:
        ranks = {name: cut_rank(network, name, rank) for name in chosen}
    folders = expert_folders(folder, chosen, info, overwrite)
    formats = check_formats(formats)
    written = []
    for name in chosen:
        config = network.backbone_config(name)
        if config is None:
            raise LoRKDError(
                "this network was made from a network object, and a bundle needs a configuration that builds it again: "
                "give LoRKDNet its backbone as a MONAI config dict with _target_"
            )
        written.append(
            write_expert_bundle(
                folders[name],
                network=(networks[name] if networks and name in networks else network.extract(name, rank)).cpu().eval(),
                network_config=config,
                work=work.only(name),
                metrics=(figures or {}).get(name, {}) if specs[name].score else {},
                parent={**(parent or {}), **({} if rank is None else {"rank of this expert": ranks[name]})},
                overwrite=overwrite,
                formats=formats,
            )
        )
        _log.info("wrote the expert bundle %s", written[-1])
    return written


def describe_expert(folder: str | Path) -> dict[str, Any]:
    """The task of an expert bundle: name, kind, classes and measured metrics, as plain JSON data.

    Raises:
        LoRKDError: ``folder`` holds no bundle that can be read.
    """
    file = Path(folder) / "configs" / "metadata.json"
    try:
        metadata = json.loads(file.read_text(encoding="utf-8"))
        channels = next(iter(metadata["network_data_format"]["outputs"].values()))["channel_def"]
    except (OSError, ValueError, KeyError, AttributeError, StopIteration) as e:
        raise LoRKDError(f"{file} describes no network: {type(e).__name__} {e}") from e
    weights = load_weights(Path(folder) / "models" / "model.pt")
    return {
        "name": Path(folder).name,
        "version": metadata.get("version"),
        "task": metadata.get("task"),
        "classes": [channels[key] for key in sorted(channels, key=int)],
        "parameters": sum(
            t.numel() for key, t in weights.items() if t.is_floating_point() and not key.endswith(_STATISTICS)
        ),
    }
