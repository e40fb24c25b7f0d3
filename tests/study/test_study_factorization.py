"""Knowledge factorization: its bounds by hand, its networks, its costs, a whole run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lorkd_monai.data import DataList, TaskSpec, load_data_list, make_phantoms
from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import TaskChannels
from lorkd_monai.study import default_settings, methods_named, plan_runs, run_study
from lorkd_monai.study.factorization import FactorLoss, build_factors, info_max, info_min, narrowed
from lorkd_monai.study.files import RunFile
from lorkd_monai.study.measures import cost_of
from lorkd_monai.study.models import build_student, teacher_of

CLASSES = {"a": 2, "b": 3}
TASKS = {n: TaskSpec(n, i, {c: str(c) for c in range(k)}) for i, (n, k) in enumerate(CLASSES.items())}
UNET = {"_target_": "UNet", "spatial_dims": 2, "in_channels": 3, "channels": [8, 16], "strides": [2]}


def data(kind: str = "classification") -> DataList:
    items = [{"image": "", "label": 0, "task": name} for name in CLASSES for _ in range(4)]
    return DataList("x", Path(), kind, 2, TASKS, training=items)


def settings(kind: str = "classification"):
    common = default_settings(kind, 2)
    return common.changed({"backbone": UNET, "teacher_backbone": UNET}) if kind == "segmentation" else common


def test_bounds_by_hand() -> None:
    x = torch.eye(3)
    assert float(info_max(x, 5 * x)) == pytest.approx(-1.0)  # pairs have cosine 1, the others 0
    assert float(info_max(x, x.roll(1, 0))) == pytest.approx(math.log((math.e + 1) / 2), abs=1e-5)
    assert float(info_max(x[:1], x[:1])) == 0.0
    z = torch.tensor([[-1.0, 1.0], [1.0, 3.0]])
    expected = 0.5 * sum(m**2 + 2 - math.log(2) - 1 for m in (0.0, 2.0)) / 2
    assert float(info_min(z)) == pytest.approx(expected, rel=1e-4)
    assert float(info_min(z[:, :, None, None])) == pytest.approx(expected, rel=1e-4)
    assert float(info_min(z[:1])) == 0.0


def test_narrower_networks() -> None:
    assert narrowed(UNET, 0.25)["channels"] == [4, 8] and narrowed(UNET, 1e-9)["channels"] == [1, 1]
    with pytest.raises(LoRKDError, match="made narrower, by one of block_inplanes, .*; ViT has none of them"):
        narrowed({"_target_": "ViT", "hidden_size": 48}, 0.5)


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
def test_one_task_costs_about_a_student(kind: str) -> None:
    factors = build_factors(settings(kind), data(kind), 0).eval()
    student = build_student(settings(kind), data(kind), False, 0).eval()
    shape = (3, 32, 32)
    ours, theirs = (cost_of(n, list(CLASSES), shape, repeats=1)["plain"]["b"] for n in (factors, student))
    for key in ("parameters", "multiply_adds"):
        assert 0.85 < ours[key] / theirs[key] < 1.2, (key, ours, theirs)
    whole = cost_of(factors, list(CLASSES), shape, repeats=1)["parameters"]
    assert whole == sum(p.numel() for n in (factors.common, *factors.specific) for p in n.parameters())


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
def test_a_task_is_served_by_its_plain_network(kind: str) -> None:
    factors = build_factors(settings(kind), data(kind), 0).eval()
    x, task = torch.rand(3, 3, 32, 32), torch.tensor([1, 0, 1])
    y, plain = factors(x, task), factors.extract("b").eval()
    torch.testing.assert_close(y[[0, 2]], plain(x[[0, 2]]), rtol=1e-4, atol=1e-5)
    assert y[1, 2].isneginf().all() and y[1, :2].isfinite().all()
    torch.testing.assert_close(factors(x, 1), plain(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain(x), factors.common.extract("b").eval()(x))  # the task-specific part counts


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
def test_the_objective_reaches_all_parts(kind: str) -> None:
    own = settings(kind)
    factors = build_factors(own, data(kind), 0).train()
    teacher = teacher_of(TaskChannels.build(own.teacher_backbone, CLASSES), list(CLASSES))
    x, task = torch.rand(3, 3, 32, 32), torch.tensor([1, 0, 1])
    loss = FactorLoss(factors, teacher, data(kind), x[:1], own)
    label = torch.tensor([2, 1, -1]) if kind == "classification" else torch.randint(0, 2, (3, 1, 32, 32))
    y, features = factors(x, task, return_features=True)
    answer, seen = teacher(x, task, return_features=True)
    total = loss(y, label, task, answer, features, seen)
    total.backward()
    terms = loss.terms
    assert terms["total"] == pytest.approx(
        terms["task"] + terms["transfer"] + terms["info_max"] + 1e-3 * terms["info_min"] + terms["own_task"], rel=1e-4
    )
    for part in (factors.common, *factors.specific, loss.feature_transfer):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    with pytest.raises(LoRKDError, match="needs distilled and transfer_weight"):
        FactorLoss(factors, None, data(kind), x[:1], own)


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
def test_a_study_with_factors(tmp_path: Path, kind: str) -> None:
    make_phantoms(tmp_path / "data", kind, 2, num_images=10, image_size=16)
    images = load_data_list(tmp_path / "data", kind, 2)
    net = UNET if kind == "segmentation" else {
        "_target_": "DenseNet", "spatial_dims": 2, "in_channels": 3, "init_features": 8, "growth_rate": 4,
        "block_config": [1, 1],
    }  # fmt: skip
    common = default_settings(kind, 2).changed(
        {
            "backbone": net, "teacher_backbone": net, "image_size": 16, "epochs": 2, "resamples": 10,
            "teacher_epochs": 1, "images_per_epoch": 16, "batch_size": 8, "val_interval": 1,
        }
    )  # fmt: skip
    runs = plan_runs(methods_named(["teacher", "kf_init"]), ["full"], [0])
    folder = run_study(tmp_path / "out", images, common, runs, say=lambda _: None)
    run = RunFile(folder, "full", "kf_init", 0).read()
    row = run["curves"]["all tasks"]["training"][1]
    assert {"info_max", "info_min", "own_task", "transfer"} <= set(row) and run["fits"]["all tasks"]["images"] == 32
    assert run["cost"]["parameters"] > max(one["parameters"] for one in run["cost"]["plain"].values())
