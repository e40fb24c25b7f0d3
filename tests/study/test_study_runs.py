"""Whole studies on a few phantoms: every family of methods, resuming, refusing, the command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lorkd_monai.bundle import write_teacher_bundle
from lorkd_monai.cli.study import report, study
from lorkd_monai.data import load_data_list, make_phantoms
from lorkd_monai.engines import DecompositionTrainer
from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import TaskChannels
from lorkd_monai.study import default_settings, methods_named, plan_runs, run_study
from lorkd_monai.study.files import RunFile, read_runs
from lorkd_monai.study.methods import QUICK_METHODS
from lorkd_monai.study.statistics import summarise
from lorkd_monai.study.transfer import STARTS, run_transfer

TINY = {
    ("classification", 2): {
        "backbone": {"_target_": "DenseNet", "spatial_dims": 2, "in_channels": 1, "init_features": 4,
                     "growth_rate": 4, "block_config": [1, 1]},
        "teacher_backbone": {"_target_": "DenseNet", "spatial_dims": 2, "in_channels": 1, "init_features": 8,
                             "growth_rate": 4, "block_config": [1, 1]},
        "in_channels": 1, "image_size": 16,
    },
    ("segmentation", 2): {
        "backbone": {"_target_": "UNet", "spatial_dims": 2, "in_channels": 1, "channels": [4, 8], "strides": [2]},
        "teacher_backbone": {"_target_": "UNet", "spatial_dims": 2, "in_channels": 1, "channels": [8, 16],
                             "strides": [2]},
        "in_channels": 1, "image_size": 16, "val_interval": 1,
    },
    ("segmentation", 3): {
        "backbone": {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "channels": [4, 8], "strides": [2]},
        "teacher_backbone": {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "channels": [8, 16],
                             "strides": [2]},
        "in_channels": 1, "image_size": [8, 8, 8], "val_interval": 1,
    },
}  # fmt: skip
SHORT = {"epochs": 2, "teacher_epochs": 2, "images_per_epoch": 16, "batch_size": 8, "single_batch_size": 4}


def prepared(folder: Path, kind: str, dims: int):
    make_phantoms(folder, kind, dims, num_images=10, image_size=16)
    data = load_data_list(folder, kind, dims)
    return data, default_settings(kind, dims).changed({**SHORT, **TINY[kind, dims], "resamples": 10})


@pytest.mark.slow
def test_classification_study(tmp_path: Path) -> None:
    data, settings = prepared(tmp_path / "data", "classification", 2)
    names = ["teacher", "stl", "mtl_kd", "separate_kd", "lorkd_norms"]
    runs = plan_runs(methods_named(names), ["full", "few30"], [0])
    said: list[str] = []
    folder = run_study(tmp_path / "out", data, settings, runs, say=said.append)
    found = {(r.setting, r.method): r.read() for r in read_runs(folder)}
    assert len(found) == len(runs) == 9
    one = found["few30", "lorkd_norms"]
    assert set(one["figures"]) == set(data.tasks) and one["ranks"] == dict.fromkeys(data.tasks, 4)
    assert len(one["gradient_conflict"]["cosines"]) == 4 and one["spectra"]["ct"]
    assert sum(one["labelled_images"].values()) < len(data.training)
    assert [row["epoch"] for row in one["curves"]["all tasks"]["training"]] == [1, 2]
    assert "transfer" in one["curves"]["all tasks"]["training"][0]
    assert set(found["full", "separate_kd"]["fits"]) == {"all tasks", *data.tasks}
    assert found["full", "stl"]["cost"]["plain"]["ct"]["parameters"] < found["full", "stl"]["cost"]["parameters"]
    assert {row.method for row in summarise(folder, 10)} == set(names)

    # Nothing is done twice; a run that was lost is done again, to the same figures.
    again: list[str] = []
    lost = next(r for r in read_runs(folder) if (r.setting, r.method) == ("full", "mtl_kd"))
    before = lost.read()["figures"]
    lost.json.unlink()
    run_study(folder, data, settings, runs, say=again.append)
    assert again[0] == "9 runs, 8 done already"
    assert lost.read()["figures"] == before

    with pytest.raises(LoRKDError, match="holds a study with other data or settings: epochs was 2, now 3"):
        run_study(folder, data, settings.changed({"epochs": 3}), runs)

    # One name, one method; one order of the images.
    renamed = methods_named(["stl"])[0]
    other = dataclasses.replace(renamed, changes={"learning_rate": 0.1})
    with pytest.raises(LoRKDError, match="made by another 'stl': settings learning_rate was 0.002, now 0.1"):
        run_study(folder, data, settings, plan_runs([other], ["full"], [0]), say=again.append)
    turned = dataclasses.replace(data, test=data.test[::-1])
    with pytest.raises(LoRKDError, match="holds a study with other data or settings: digest was"):
        run_study(folder, turned, settings, runs, say=again.append)
    teacher = next(r for r in read_runs(folder) if r.method == "teacher")
    teacher.weights.unlink()
    with pytest.raises(LoRKDError, match=r"seed0.pt is missing: delete .*seed0.json to train this teacher again"):
        run_study(
            folder, data, settings, plan_runs(methods_named(["mtl_kd", "lorkd"]), ["full"], [0]), say=again.append
        )


@pytest.mark.slow
def test_batches_of_few_tasks_are_for_all_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, settings = prepared(tmp_path / "data", "classification", 2)
    settings = settings.changed({"tasks_per_batch": 2})
    seen: dict[str, set[tuple[int, ...]]] = {}
    step, method = DecompositionTrainer._prepare, [""]

    def noted(trainer, batch, *args, **kwargs):
        tasks, counts = batch["task"].unique(return_counts=True)
        seen.setdefault(method[0], set()).add((*counts.tolist(),))
        return step(trainer, batch, *args, **kwargs)

    monkeypatch.setattr(DecompositionTrainer, "_prepare", noted)
    for name in ("teacher", "stl_kd", "mtl_kd", "separate_kd", "lorkd"):
        method[0] = name
        runs = plan_runs(methods_named([name]), ["full"], [0])
        run_study(tmp_path / "out", data, settings, runs, say=lambda _: None)
    assert seen["teacher"] == seen["mtl_kd"] == seen["lorkd"] == {(4, 4)}
    assert seen["stl_kd"] == {(4,)} and seen["separate_kd"] == {(4, 4), (4,)}


@pytest.mark.slow
@pytest.mark.parametrize("dims", [2, 3])
def test_segmentation_study(tmp_path: Path, dims: int) -> None:
    data, settings = prepared(tmp_path / "data", "segmentation", dims)
    runs = plan_runs(methods_named(["teacher", "lorkd"]), ["few30"], [0])
    folder = run_study(tmp_path / "out", data, settings, runs, say=lambda line: None)
    run = next(r for r in read_runs(folder) if r.method == "lorkd")
    content, arrays = run.read(), run.read_arrays()
    assert content["score"] == "dice" and 0 <= content["mean"] <= 1
    assert arrays["0_best_image"].shape == arrays["0_worst_prediction"].shape
    assert arrays["0_best_image"].ndim == 2 and arrays["0_dice"].shape[1] == data.tasks["ct"].num_classes - 1


def test_a_missing_teacher_is_named(tmp_path: Path) -> None:
    data, settings = prepared(tmp_path / "data", "classification", 2)
    with pytest.raises(LoRKDError, match="seed 0 has no teacher yet: put 'teacher' among the methods"):
        run_study(
            tmp_path / "out", data, settings, plan_runs(methods_named(["mtl_kd"]), ["full"], [0]), say=lambda _: None
        )


def test_methods_must_share_the_images(tmp_path: Path) -> None:
    data, settings = prepared(tmp_path / "data", "classification", 2)
    methods = methods_named(["big"], {"big": {"base": "mtl", "image_size": 32}})
    with pytest.raises(LoRKDError, match="method 'big' changes image_size, which all runs of a study share"):
        run_study(tmp_path / "out", data, settings, plan_runs(methods, ["full"], [0]), say=lambda _: None)


def test_what_can_not_work_is_said_before_anything_is_written(tmp_path: Path) -> None:
    data, settings = prepared(tmp_path / "data", "classification", 2)
    folder = tmp_path / "out"
    runs = plan_runs(methods_named(["mtl"]), ["full"], [0])
    unknown = settings.changed({"backbone": {"_target_": "NoSuchNet"}})
    with pytest.raises(LoRKDError, match="NoSuchNet"):
        run_study(folder, data, unknown, runs, say=lambda _: None)
    unscored = dataclasses.replace(
        data, tasks={name: dataclasses.replace(task, score=False) for name, task in data.tasks.items()}
    )
    with pytest.raises(LoRKDError, match="has no task that counts"):
        run_study(folder, unscored, settings, runs, say=lambda _: None)
    with pytest.raises(LoRKDError, match='"score": false in the data list'):
        run_transfer(folder, unscored, settings, plan_runs(methods_named(["lorkd"]), ["full"], [0]), ["ct"])
    assert not folder.exists()
    folder.write_text("a file")
    with pytest.raises(LoRKDError, match="is a file, expected a folder"):
        run_study(folder, data, settings, runs, say=lambda _: None)


def test_the_command_lists_its_plan(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    study(str(tmp_path), methods="mtl", settings=("full", "few10"), seeds=1, plan_only=True)
    assert capsys.readouterr().out.splitlines() == [
        "full mtl seed 1: multi-task learning: one student, a head for each task",
        "few10 mtl seed 1: multi-task learning: one student, a head for each task",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": "a"}, "seeds: expected whole numbers"),
        ({"variants": "[1]"}, "variants: expected"),
        ({"kind": "detection"}, "expected kind"),
        ({"methods": "nothing"}, "unknown method 'nothing'"),
        ({"eposch": 3}, "unknown setting 'eposch'"),
        ({}, "dataset_dir: expected the folder of a data list"),
        ({"dataset_dir": 2024}, r"dataset_dir: expected a path, got 2024; write \./2024"),
        ({"amp": "false"}, "amp must be True or False, got 'false'"),
        ({"flip_axes": "0"}, "flip_axes must be a list of axes of the image"),
        ({"backbone": "foo"}, "backbone must be the MONAI config of a network"),
        ({"methods": "a", "variants": "{a: {base: mtl, temprature: 8}}"}, "method 'a': unknown setting 'temprature'"),
        ({"methods": "a", "variants": "{a: {base: mtl, image_size: 8}}"}, "method 'a' changes image_size"),
        ({"methods": "a", "variants": "{a: {base: mtl, epochs: 0}}", "plan_only": True}, "method 'a': epochs must be"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(LoRKDError, match=message):
        study(str(tmp_path / "out"), **arguments)


@pytest.mark.slow
def test_other_starts(tmp_path: Path) -> None:
    data, settings = prepared(tmp_path / "data", "classification", 2)
    names = ["teacher", "lorkd_init", "lorkd_warmup", "lorkd_imbalanced"]
    changed = settings.changed({"teacher_members": 2})
    folder = run_study(
        tmp_path / "out", data, changed, plan_runs(methods_named(names), ["full"], [0]), say=lambda _: None
    )
    found = {r.method: r.read() for r in read_runs(folder)}
    assert set(found) == set(names) and len(found["teacher"]["fits"]) == 2
    assert set(found["lorkd_imbalanced"]["ranks"].values()) == {2, 4, 8}
    # Four epochs of warm-up are longer than this run: the factors have not moved.
    assert all(row["values"] == [] for row in found["lorkd_warmup"]["spectra"]["ct"].values())


@pytest.mark.slow
def test_quick_form_on_phantoms(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The whole of it: every method of the quick form, in both settings, with its own budget."""
    out = tmp_path / "out"
    study(str(out), quick=True, device="cpu")
    assert "### Differences" in capsys.readouterr().out
    done = [(run["setting"], run["method"]) for run in map(RunFile.read, read_runs(out))]
    assert sorted(done) == sorted(
        [("full", "teacher"), *((s, m) for s in ("full", "few10") for m in QUICK_METHODS if m != "teacher")]
    )


@pytest.mark.slow
def test_a_bundle_as_the_foundation_model(tmp_path: Path) -> None:
    data, settings = prepared(tmp_path / "data", "classification", 2)
    view = TaskChannels.build(settings.teacher_backbone, data.num_classes)
    bundle = write_teacher_bundle(
        tmp_path / "bundle", network=view.network, network_config=view.config,
        work=data.work(1, 16),
    )  # fmt: skip
    settings = settings.changed({"teacher_bundle": str(bundle)})
    runs = plan_runs(methods_named(["teacher", "mtl_kd"]), ["full"], [0])
    folder = run_study(tmp_path / "out", data, settings, runs, say=lambda _: None)
    teacher, student = sorted((r.read() for r in read_runs(folder)), key=lambda content: content["method"])[::-1]
    assert teacher["fits"] == {} and teacher["time"]["training_s"] == 0
    assert "transfer" in student["curves"]["all tasks"]["training"][0]


@pytest.mark.slow
def test_transfer_to_a_task_held_out(tmp_path: Path) -> None:
    data, settings = prepared(tmp_path / "data", "classification", 2)
    runs = plan_runs(methods_named(["lorkd"]), ["few30", "full"], [0])
    (folder,) = run_transfer(tmp_path / "out", data, settings, runs, ["mr"], say=lambda _: None)
    assert folder.name == "unseen_2"
    found = {(r.setting, r.method): r.read() for r in read_runs(folder)}
    assert set(found) == {(s, m) for s in ("few30", "full") for m in STARTS}
    expert = found["full", "from_expert"]
    assert expert["nearest"] == min(expert["distances"], key=expert["distances"].get)
    assert set(expert["distances"]) == {"ct", "ultrasound", "cells"} and set(expert["figures"]) == {"mr"}
    size = {m: found["full", m]["cost"]["plain"]["mr"]["parameters"] for m in STARTS}
    assert size["from_scratch"] == size["from_expert"] < size["from_teacher"]
    assert {row.method for row in summarise(folder, 10)} == set(STARTS)
    other = plan_runs(methods_named(["lorkd_r8"]), ["full"], [0])
    said: list[str] = []
    with pytest.raises(LoRKDError, match="decomposition was 'lorkd', now 'lorkd_r8'"):
        run_transfer(tmp_path / "out", data, settings, other, ["mr"], say=said.append)
    assert said == []
    text = Path(report(str(tmp_path / "out"))).read_text(encoding="utf-8")
    assert "Transfer to a task that none has seen" in text and "mr (nearest: " in text


def test_bad_transfer(tmp_path: Path) -> None:
    data, settings = prepared(tmp_path / "data", "classification", 2)
    lorkd = plan_runs(methods_named(["lorkd"]), ["full"], [0])
    for names, task, message in (
        (["mtl"], "mr", "expected one decomposition among the methods, got mtl"),
        (["lorkd", "lorkd_r8"], "mr", "expected one decomposition among the methods, got lorkd, lorkd_r8"),
        (["lorkd"], "none", "unknown task 'none'"),
    ):
        with pytest.raises(LoRKDError, match=message):
            run_transfer(tmp_path / "out", data, settings, plan_runs(methods_named(names), ["full"], [0]), [task])
    with pytest.raises(LoRKDError, match="with one task held out two must be left"):
        run_transfer(tmp_path / "out", data.only("mr", "ct"), settings, lorkd, ["mr"])


def test_tasks_that_count_need_test_images(tmp_path: Path) -> None:
    data, settings = prepared(tmp_path / "data", "classification", 2)
    runs = plan_runs(methods_named(["mtl"]), ["full"], [0])
    less = dataclasses.replace(data, test=[item for item in data.test if item["task"] != "mr"])
    with pytest.raises(LoRKDError, match="has no test images of task 'mr'"):
        run_study(tmp_path / "out", less, settings, runs)
    with pytest.raises(LoRKDError, match="unseen: task 'mr' has no test images"):
        run_transfer(tmp_path / "out", less, settings, plan_runs(methods_named(["lorkd"]), ["full"], [0]), ["mr"])
    tasks = {**data.tasks, "mr": dataclasses.replace(data.tasks["mr"], score=False)}
    folder = run_study(tmp_path / "out", dataclasses.replace(less, tasks=tasks), settings, runs, say=lambda _: None)
    assert set(summarise(folder, 10)[0].tasks) == {"ct", "ultrasound", "cells"}
