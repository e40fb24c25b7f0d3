"""The files of a teacher's bundle: one network, one output, the classes of all tasks one after the other."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lorkd_monai.bundle.configs import DEVICE, Pipeline, default_inferer
from lorkd_monai.bundle.inert import inert_text, markdown_text
from lorkd_monai.bundle.metadata import build_metadata
from lorkd_monai.tasks import TaskSpec, Work

__all__ = ["teacher_files"]


def teacher_files(
    work: Work,
    channels: Sequence[str],
    network_config: dict,
    preprocessing: list[dict],
    metrics: Mapping[str, Any],
    description: str | None,
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return the content of metadata.json, of inference.json, and the text of docs/README.md.

    ``channels`` names the output channels, ``"<task>: <class>"``. An output of many tasks has no one softmax or
    argmax, so that inference.json holds the network and its input only.
    """
    tasks, kind, spatial_dims = list(work.tasks), work.kind, work.spatial_dims
    together = TaskSpec("multi_task", 0, dict(enumerate(channels)))
    pipeline = Pipeline(preprocessing, [], [], default_inferer(kind, work.image_size))
    metadata = build_metadata(
        dataclasses.replace(work, tasks={together.name: together}), pipeline, network_config, metrics, parent={}
    )
    metadata["name"] = f"Multi-task {kind} teacher"
    metadata["description"] = inert_text(
        description
        or f"A {spatial_dims}D {kind} network of {len(tasks)} tasks ({', '.join(tasks)}), a teacher for a "
        "low-rank knowledge decomposition (LoRKD). Its output holds the classes of all tasks one after the other."
    )
    metadata["task"] = f"{spatial_dims}D {kind}: {', '.join(tasks)}"
    metadata["changelog"] = {metadata["version"]: "first version"}
    metadata["network_data_format"]["outputs"]["pred"]["type"] = "image" if kind == "segmentation" else "logits"
    del metadata["torchscript"]
    inference = {
        "imports": ["$import os"],
        "bundle_root": ".",
        "ckpt_path": "$@bundle_root + '/models/model.pt'",
        "device": DEVICE,
        "network_def": copy.deepcopy(network_config),
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": copy.deepcopy(preprocessing)},
        "inferer": pipeline.inferer,
    }
    listed = "\n".join(f"* {i}: {markdown_text(name)}" for i, name in enumerate(channels))
    readme = f"""# {metadata["name"]}

## **Model Description**
{markdown_text(metadata["description"])}

Its output channels:

{listed}

## **Usage**
`python -m monai.bundle run training … --teacher_bundle FOLDER` of a LoRKD training bundle takes this folder as it is;
`monai.bundle.load(NAME, bundle_dir=DIR, workflow_type="inference")` gives the network with its weights.

## **Limitations**
Not for clinical use: this is research software that no regulatory agency has cleared or approved.
"""
    return metadata, inference, readme
