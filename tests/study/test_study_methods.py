"""Methods, settings and the plan of a study."""

from __future__ import annotations

import pytest

from lorkd_monai.errors import LoRKDError
from lorkd_monai.study import METHODS, default_settings, methods_named, plan_runs
from lorkd_monai.study.methods import FAMILIES, label_share_of

COMMON = default_settings("classification", 2)


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
@pytest.mark.parametrize("dims", [2, 3])
def test_every_method_has_settings(kind: str, dims: int) -> None:
    for name, method in METHODS.items():
        assert method.name == name and method.family in FAMILIES
        method.settings(default_settings(kind, dims))


def test_other_kinds_are_refused() -> None:
    with pytest.raises(LoRKDError, match="'classification' or 'segmentation' and spatial_dims 2 or 3"):
        default_settings("detection", 2)


@pytest.mark.parametrize(("setting", "share"), [("full", 1.0), ("few10", 0.1), ("few5", 0.05), ("few99", 0.99)])
def test_share_of_labels(setting: str, share: float) -> None:
    assert label_share_of(setting) == share


@pytest.mark.parametrize("setting", ["few", "few0", "few100", "half", "few10 ", 10])
def test_bad_setting(setting: object) -> None:
    with pytest.raises(LoRKDError, match="a setting is 'full' or 'few'"):
        label_share_of(setting)


def test_a_variant_changes_its_base() -> None:
    (hot,) = methods_named(["hot"], {"hot": {"base": "lorkd", "temperature": 8.0}})
    assert (hot.family, hot.distilled, hot.settings(COMMON).temperature) == ("lorkd", True, 8.0)
    assert hot.settings(COMMON).rank == COMMON.rank
    (cold,) = methods_named(["cold"], {"cold": {"base": "lorkd_r8", "distilled": False}})
    assert not cold.distilled and cold.settings(COMMON).rank == 8


def test_bad_methods() -> None:
    with pytest.raises(LoRKDError, match="unknown method 'lora'"):
        methods_named(["lora"])
    with pytest.raises(LoRKDError, match="a variant's name"):
        methods_named(["../x"], {"../x": {"base": "lorkd"}})
    with pytest.raises(LoRKDError, match="variant 'hot': expected"):
        methods_named(["hot"], {"hot": {"temperature": 8.0}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be a whole number of at least 1"),
        ({"epochs": True}, "epochs must be a whole number"),
        ({"ema": 1.0}, "ema must be a number from 0 to below 1"),
        ({"learning_rate": 0}, "learning_rate must be a number above 0"),
        ({"label_share": 0.0}, "label_share must be"),
        ({"selection": "first"}, "selection must be one of 'best', 'last'"),
        ({"images_per_epoch": 0}, "images_per_epoch must be a whole number of at least 1, or None"),
        ({"tasks_per_batch": 0}, "tasks_per_batch must be a whole number of at least 1, or None"),
        ({"tasks_per_batch": 65}, r"tasks_per_batch must be at most batch_size \(64\), got 65"),
        ({"rank": "big"}, "rank must be"),
        ({"image_size": [8, 0]}, "image_size must be"),
        ({"nonsense": 1}, "unknown setting 'nonsense'"),
    ],
)
def test_bad_settings(changes: dict, message: str) -> None:
    with pytest.raises(LoRKDError, match=message):
        COMMON.changed(changes)


def test_networks_of_one_task_see_as_many_images_of_it() -> None:
    assert COMMON.images_of_one_task == COMMON.single_batch_size == 16
    assert COMMON.changed({"tasks_per_batch": 2}).images_of_one_task == 32
    (few,) = methods_named(["few"], {"few": {"base": "stl_kd", "tasks_per_batch": 8}})
    assert few.settings(COMMON).images_of_one_task == 8


def test_plan_has_one_teacher_of_each_seed_first() -> None:
    runs = plan_runs(methods_named(["mtl", "teacher"]), ["full", "few10"], [0, 1])
    assert [(r.setting, r.method.name, r.seed) for r in runs] == [
        ("full", "teacher", 0), ("full", "mtl", 0), ("few10", "mtl", 0),
        ("full", "teacher", 1), ("full", "mtl", 1), ("few10", "mtl", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("methods", "settings", "seeds", "message"),
    [
        ([], ["full"], [0], "methods: expected at least one"),
        (["mtl"], [], [0], "settings: expected at least one"),
        (["mtl"], ["full"], [], "seeds: expected at least one"),
        (["mtl"], ["full"], [-1], "seeds are whole numbers"),
        (["mtl"], ["some"], [0], "a setting is"),
    ],
)
def test_bad_plan(methods: list, settings: list, seeds: list, message: str) -> None:
    with pytest.raises(LoRKDError, match=message):
        plan_runs(methods_named(methods), settings, seeds)
