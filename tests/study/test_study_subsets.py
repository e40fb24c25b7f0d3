"""Few labels, some tasks: which images a student sees, and with which labels."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lorkd_monai.cli.study import study
from lorkd_monai.data import TaskBatchSampler, load_data_list, make_phantoms
from lorkd_monai.data.datasets import TaskDataset
from lorkd_monai.errors import LoRKDError
from lorkd_monai.study.subsets import LabelShareSampler, Part, choose_labelled
from lorkd_monai.transforms import BatchAugment

ITEMS = [{"task": t, "label": i % 2} for t, n in (("a", 40), ("b", 6)) for i in range(n)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TaskDataset:
    folder = tmp_path_factory.mktemp("phantoms")
    make_phantoms(folder, "classification", 2, num_images=20, image_size=16)
    return TaskDataset(load_data_list(folder, "classification", 2), "training", 3, 16)


def test_labels_are_stratified() -> None:
    chosen = choose_labelled(ITEMS, 0.2, seed=0)
    groups = [(item["task"], item["label"]) for item, keep in zip(ITEMS, chosen) if keep]
    assert {g: groups.count(g) for g in set(groups)} == {("a", 0): 4, ("a", 1): 4, ("b", 0): 1, ("b", 1): 1}


def test_labels_depend_on_the_seed_alone() -> None:
    assert choose_labelled(ITEMS, 0.2, 1) == choose_labelled(ITEMS, 0.2, 1) != choose_labelled(ITEMS, 0.2, 2)
    assert all(choose_labelled(ITEMS, 1.0, 0))


def test_images_without_a_label_have_none_to_keep(base: TaskDataset, tmp_path) -> None:
    items = [{**item, "label": None if i % 4 == 0 else item["label"]} for i, item in enumerate(ITEMS)]
    chosen = choose_labelled(items, 1.0, seed=0)
    assert chosen == [i % 4 != 0 for i in range(len(items))]
    make_phantoms(tmp_path, "classification", 2, num_images=10, image_size=16)
    content = json.loads((tmp_path / "dataset.json").read_text())
    for item in content["training"][::2]:
        item["label"] = None
    content["test"] = []
    content["tasks"] = {name: task for name, task in content["tasks"].items() if "npz" not in task}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    own = TaskDataset(load_data_list(tmp_path, "classification", 2), "training", 3, 16)
    part, dropped = Part(own, list(own.data.tasks)), Part(own, list(own.data.tasks), drop_unlabelled=True)
    assert part.labelled == [item["label"] is not None for item in own.data.training] and not all(part.labelled)
    assert len(dropped) == sum(part.labelled) and all(dropped.labelled)
    assert [int(part[i]["label"]) == -1 for i in range(len(part))] == [not known for known in part.labelled]
    with pytest.raises(LoRKDError, match="has no test images with labels to measure on.*--folds"):
        study(str(tmp_path / "out"), str(tmp_path), plan_only=True)


def test_masks_are_chosen_by_task() -> None:
    items = [{"task": "a", "label": "x.png"}] * 10 + [{"task": "b", "label": "y.png"}] * 3
    chosen = choose_labelled(items, 0.1, 0)
    assert (sum(chosen[:10]), sum(chosen[10:])) == (1, 1)


def test_some_tasks_are_numbered_anew(base: TaskDataset) -> None:
    data = base.data.only("mr", "cells")
    assert [task.index for task in data.tasks.values()] == [0, 1]
    part = Part(base, ["cells", "mr"])
    assert len(part) == len(data.training) and set(part.task_of_item) == {0, 1}
    item = part[0]
    assert int(item["task"]) == part.task_of_item[0] and int(item["label"]) >= 0
    torch.testing.assert_close(item["image"], base[part.indices[0]]["image"])


def test_images_without_labels_are_hidden_or_dropped(base: TaskDataset) -> None:
    labelled = choose_labelled(base.items, 0.3, 0)
    names = list(base.data.tasks)
    hidden, dropped = Part(base, names, labelled), Part(base, names, labelled, drop_unlabelled=True)
    assert len(hidden) == len(base) and len(dropped) == sum(labelled)
    assert [int(hidden[i]["label"]) == -1 for i in range(len(base))] == [not known for known in labelled]
    assert all(int(dropped[i]["label"]) >= 0 for i in range(len(dropped)))


def test_draws_hold_their_share_of_labels(base: TaskDataset) -> None:
    part = Part(base, list(base.data.tasks), choose_labelled(base.items, 0.1, 0))
    sampler = LabelShareSampler(part, 0.5, strategy="balanced", num_samples=80, seed=3)
    first = [draw.index for draw in sampler]
    assert first == [draw.index for draw in sampler]
    known = np.asarray(part.labelled)[first]
    tasks = np.asarray(part.task_of_item)[first]
    assert [int((tasks == t).sum()) for t in range(4)] == [20] * 4
    # Half are drawn from the labelled ones, and some of the other half happen to be.
    assert all(known[tasks == t].sum() >= 10 for t in range(4)) and known.mean() < 0.8
    sampler.set_epoch(1)
    assert first != [draw.index for draw in sampler]


def test_draws_of_few_tasks_hold_their_share_of_labels(base: TaskDataset) -> None:
    part = Part(base, list(base.data.tasks), choose_labelled(base.items, 0.1, 0))
    sampler = LabelShareSampler(part, 0.5, strategy="balanced", num_samples=160, seed=3)
    batches = list(TaskBatchSampler(sampler, 8, 2))
    known, tasks = np.asarray(part.labelled), np.asarray(part.task_of_item)
    drawn = np.array([draw.index for batch in batches for draw in batch])
    assert len(batches) == 20 and all(known[drawn][tasks[drawn] == t].sum() >= 20 for t in range(4))
    # The labelled ones are spread over the batches of their task.
    assert sum(known[[draw.index for draw in batch]].any() for batch in batches) >= 18


def test_a_mask_without_a_label_stays_so() -> None:
    image, mask = torch.rand(2, 1, 16, 16), torch.full((2, 1, 16, 16), -1)
    mask[1] = 1
    augment = BatchAugment(2, rotate=90, translate=0.5, probability=1.0, seed=0)
    changed = augment(image, mask, 0)[1]
    assert (changed[0] == -1).all() and set(changed[1].unique().tolist()) == {0, 1}
