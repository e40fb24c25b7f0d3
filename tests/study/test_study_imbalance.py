"""The setting of unequal tasks: which images are kept, whose teacher teaches, what the runs say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorkd_monai.data import DataList, TaskSpec, load_data_list, make_phantoms
from lorkd_monai.data.datasets import TaskDataset
from lorkd_monai.errors import LoRKDError
from lorkd_monai.report import study_source
from lorkd_monai.study import default_settings, methods_named, plan_runs, run_study
from lorkd_monai.study.files import RunFile
from lorkd_monai.study.imbalance import imbalanced, kept_indices, small_tasks
from lorkd_monai.study.methods import kept_images_of, label_share_of, teacher_setting_of
from lorkd_monai.study.statistics import summarise
from lorkd_monai.study.transfer import run_transfer

DENSENET = {
    "_target_": "DenseNet", "spatial_dims": 2, "in_channels": 1, "init_features": 4, "growth_rate": 4,
    "block_config": [1, 1],
}  # fmt: skip


def data(counts: dict[str, list[int]]) -> DataList:
    tasks = {n: TaskSpec(n, i, {c: str(c) for c in range(len(k))}) for i, (n, k) in enumerate(counts.items())}
    items = [
        {"image": f"{name}{c}{i}", "label": c, "task": name}
        for name, of_class in counts.items()
        for c, number in enumerate(of_class)
        for i in range(number)
    ]
    return DataList("x", Path(), "classification", 2, tasks, training=items)


def test_names_of_the_setting() -> None:
    assert [kept_images_of(s) for s in ("imbalance", "imbalance30", "full", "few10")] == [50, 30, None, None]
    assert [teacher_setting_of(s) for s in ("imbalance30", "full", "few10")] == ["imbalance30", "full", "full"]
    assert label_share_of("imbalance") == 1.0
    with pytest.raises(LoRKDError, match="or 'imbalance'"):
        label_share_of("imbalance0")


def test_half_of_the_tasks_keep_few_images_of_each_class() -> None:
    whole = data({name: [150, 40, 10] for name in "abcde"})
    small = small_tasks(list(whole.tasks))
    assert len(small) == 2 and small == sorted(small)
    kept = imbalanced(whole, 50)
    for name in whole.tasks:
        of_class = [sum(i["task"] == name and i["label"] == c for i in kept.training) for c in range(3)]
        assert of_class == ([38, 10, 2] if name in small else [150, 40, 10]), name
    assert kept_indices(whole, 50) == kept_indices(whole, 50)
    assert sum(item in kept.training for item in imbalanced(whole, 30).training if item["task"] in small) == 60


def test_classes_tasks_and_labels_at_the_edge() -> None:
    whole = data({name: [100, 100, 1] for name in "ab"})
    (small,) = small_tasks(["a", "b"])
    own = [item for item in imbalanced(whole, 4).training if item["task"] == small]
    assert len(own) <= 5 and {item["label"] for item in own} == {0, 1, 2}
    assert len(imbalanced(whole, 500).training) == len(whole.training)
    for item in whole.training[::2]:
        item["label"] = None
    own = [item for item in imbalanced(whole, 10).training if item["task"] == small]
    assert len(own) == 10 and all(item["label"] is not None for item in own)
    with pytest.raises(LoRKDError, match="needs two tasks"):
        small_tasks(["a"])


def test_a_part_of_a_data_set_is_its_items(tmp_path: Path) -> None:
    make_phantoms(tmp_path, "classification", 2, num_images=10, image_size=16)
    whole = load_data_list(tmp_path, "classification", 2)
    base, indices = TaskDataset(whole, "training", 1, 16), kept_indices(whole, 2)
    part = base.only(imbalanced(whole, 2), indices)
    assert len(part) == len(indices) < len(base) and part.items == part.data.training
    for new, old in enumerate(indices):
        torch.testing.assert_close(part[new]["image"], base[old]["image"], rtol=0, atol=0)
        assert part[new]["label"] == base[old]["label"] and part[new]["task"] == base[old]["task"]


def test_the_plan_has_a_teacher_of_the_unequal_images() -> None:
    runs = plan_runs(methods_named(["mtl", "teacher"]), ["full", "few10", "imbalance"], [0])
    assert [r.setting for r in runs if r.method.name == "teacher"] == ["full", "imbalance"]
    runs = plan_runs(methods_named(["mtl", "teacher"]), ["imbalance"], [0])
    assert [(r.setting, r.method.name) for r in runs] == [("imbalance", "teacher"), ("imbalance", "mtl")]


def test_a_study_of_unequal_tasks(tmp_path: Path) -> None:
    make_phantoms(tmp_path / "data", "classification", 2, num_images=10, image_size=16)
    whole = load_data_list(tmp_path / "data", "classification", 2)
    settings = default_settings("classification", 2).changed(
        {
            "backbone": DENSENET, "teacher_backbone": DENSENET, "in_channels": 1, "image_size": 16, "epochs": 1,
            "teacher_epochs": 1, "images_per_epoch": 8, "batch_size": 8, "resamples": 10,
        }
    )  # fmt: skip
    folder, say = tmp_path / "out", lambda _: None
    distilled = methods_named(["mtl_kd"])
    with_teacher = methods_named(["teacher", "mtl_kd"])
    run_study(folder, whole, settings, plan_runs(methods_named(["teacher"]), ["full"], [0]), say=say)
    with pytest.raises(LoRKDError, match="seed 0 has no teacher yet"):
        run_study(folder, whole, settings, plan_runs(distilled, ["imbalance2"], [0]), say=say)
    run_study(folder, whole, settings, plan_runs(with_teacher, ["full", "imbalance2"], [0]), say=say)
    small = small_tasks(list(whole.tasks))
    teacher, student, full = (
        RunFile(folder, setting, name, 0).read()
        for setting, name in (("imbalance2", "teacher"), ("imbalance2", "mtl_kd"), ("full", "mtl_kd"))
    )
    for run in (teacher, student):
        assert run["imbalance"] == {"kept_images": 2, "small_tasks": small}
        assert all((n == 2) == (name in small) for name, n in run["labelled_images"].items())
    assert "imbalance" not in full and sum(full["labelled_images"].values()) == len(whole.training)
    rows = {(row.setting, row.method): row for row in summarise(folder, 10)}
    assert rows["imbalance2", "teacher"].mean == pytest.approx(teacher["mean"])
    assert rows["full", "teacher"].runs[0]["setting"] == "full"
    assert "Setting imbalance2" in dict(study_source._facts(list(rows.values()), {}))
    with pytest.raises(LoRKDError, match="not imbalance2"):
        run_transfer(tmp_path / "t", whole, settings, plan_runs(methods_named(["lorkd"]), ["imbalance2"], [0]), ["ct"])
