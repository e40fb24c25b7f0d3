"""Runs of a study whose predictions are written down by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lorkd_monai.study.files import RunFile

LABELS = np.array([0, 0, 1, 1])


def one_hot(called: list[int]) -> np.ndarray:
    return np.eye(2, dtype=np.float32)[called]


def write_run(
    folder: Path, method: str, seed: int, called: list[list[int]], setting: str = "full", family: str = "mtl"
) -> RunFile:
    """A run of a study with two classification tasks of four test images each, both with the labels 0 0 1 1."""
    arrays, figures = {}, {}
    for i, one in enumerate(called):
        arrays |= {f"{i}_probability": one_hot(one), f"{i}_label": LABELS}
        right = np.asarray(one) == LABELS
        value = (right[:2].mean() + right[2:].mean()) / 2
        figures["ab"[i]] = {"balanced_accuracy": {"value": value, "low": value, "high": value, "n": 4}}
    plain = {"parameters": 10, "multiply_adds": 1000, "latency_s": 0.001}
    content = {
        "method": method,
        "family": family,
        "about": f"about {method}",
        "setting": setting,
        "seed": seed,
        "score": "balanced_accuracy",
        "mean": float(np.mean([f["balanced_accuracy"]["value"] for f in figures.values()])),
        "figures": figures,
        "labelled_images": {"a": 4, "b": 4},
        "fits": {"all tasks": {"epoch": 1, "validation": 0.5, "seconds": 1.0, "cpu_seconds": 1.0, "images": 4}},
        "curves": {
            "all tasks": {
                "training": [{"epoch": 1, "total": 2.0, "task": 1.0, "task/a": 1.0, "transfer": 1.0}],
                "validation": [{"epoch": 1, "mean": 0.5, "a": 0.5, "b": 0.5}],
            }
        },
        "cost": {"parameters": 20, "plain": {"a": plain, "b": plain}},
        "time": {"training_s": 60.0, "training_cpu_s": 30.0, "evaluation_s": 1.0},
        "memory": {"process": 1000, "gpu": None},
        "settings": {
            "teacher_backbone": {"_target_": "Big"}, "backbone": {"_target_": "Small"}, "image_size": 8, "epochs": 1,
            "images_per_epoch": 4, "batch_size": 2, "learning_rate": 0.1, "ema": 0.0, "selection": "best",
            "teacher_members": 1, "teacher_epochs": 2, "layout": "lorkd", "norm": "shared",
        },
        "data": {
            "name": "made by hand", "kind": "classification", "spatial_dims": 2,
            "images": {t: {"training": 4, "validation": 4, "test": 4} for t in "ab"},
            "tasks": {t: {"labels": {"0": "no", "1": "<b>yes</b>"}, "modality": "CT", "scored": True} for t in "ab"},
        },
        "command": "lorkd study", "versions": {"torch": "2"}, "hardware": {"cpu": "x"},
        "finished": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    run = RunFile(folder, setting, method, seed)
    run.write(content, arrays)
    return run
