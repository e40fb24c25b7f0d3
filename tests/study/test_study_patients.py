"""The bootstrap of a study over patients, where it knows whose the test images are."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from lorkd_monai.data import DataList, TaskSpec
from lorkd_monai.errors import LoRKDError
from lorkd_monai.metrics import bootstrap, classification_figures, segmentation_figures
from lorkd_monai.metrics.bootstrap import Clusters, weight_chunks
from lorkd_monai.metrics.classification import balanced_accuracy
from lorkd_monai.study.agreement import agree_on_settings
from lorkd_monai.study.files import RunFile
from lorkd_monai.study.patients import clusters_of, patient_numbers, with_patients
from lorkd_monai.study.settings import default_settings
from lorkd_monai.study.statistics import Summary, compare, summarise

PATIENTS, EACH = 40, 10
SCORES = np.random.default_rng(0).normal(0.7, 0.1, PATIENTS)  # of each patient, the same in all images


def write(
    folder: Path, dice: dict[str, np.ndarray], patients: dict[str, list[int]] | None, method: str = "mtl", seed: int = 0
) -> None:
    """A run of segmentation tasks with a Dice of each test image."""
    content = {
        "method": method, "family": "mtl", "setting": "full", "seed": seed, "score": "dice", "mean": 0.0,
        "data": {"kind": "segmentation", "tasks": {name: {"scored": True} for name in dice}},
        **({} if patients is None else {"patients": patients}),
    }  # fmt: skip
    arrays = {f"{i}_dice": values[:, None] for i, values in enumerate(dice.values())}
    RunFile(folder, "full", method, seed).write(content, arrays)


def found(folder: Path) -> Summary:
    (row,) = summarise(folder, 4000)
    return row


def width(row: Summary) -> float:
    return row.high - row.low


def test_images_of_one_patient_are_no_independent_images(tmp_path: Path) -> None:
    """Ten equal images of each of 40 patients tell as much as one: the standard error is that of 40 values."""
    images, whose = SCORES.repeat(EACH), np.arange(PATIENTS).repeat(EACH).tolist()
    write(tmp_path / "by_image", {"a": images}, None)
    write(tmp_path / "by_patient", {"a": images}, {"a": whose})
    write(tmp_path / "one_each", {"a": SCORES}, None)
    by_image, by_patient, one_each = (found(tmp_path / name) for name in ("by_image", "by_patient", "one_each"))
    right = 2 * 1.96 * SCORES.std() / PATIENTS**0.5
    assert width(by_patient) == pytest.approx(right, rel=0.05)
    assert width(by_image) == pytest.approx(right / EACH**0.5, rel=0.05)
    assert (by_patient.low, by_patient.high) == pytest.approx((one_each.low, one_each.high), abs=1e-12)
    assert by_patient.task_intervals["a"] == (by_patient.low, by_patient.high)
    assert (by_image.unit, by_patient.unit) == ("images", "patients")


def test_tasks_that_share_patients_share_their_resamples(tmp_path: Path) -> None:
    """Two tasks that say the same of the same patients are no more certain than one; of other patients they are."""
    shared = list(range(PATIENTS))
    write(tmp_path / "shared", {"a": SCORES, "b": SCORES[::-1]}, {"a": shared, "b": shared[::-1]})
    write(tmp_path / "apart", {"a": SCORES, "b": SCORES}, {"a": shared, "b": [PATIENTS + i for i in shared]})
    one, two = found(tmp_path / "shared"), found(tmp_path / "apart")
    for task in "ab":
        assert one.task_intervals[task] == pytest.approx((one.low, one.high))
    assert width(two) == pytest.approx(width(one) / 2**0.5, rel=0.05)


def test_patients_with_one_image_each_are_images(tmp_path: Path) -> None:
    """The same draws, so that the intervals are the same to the last bit."""
    dice = {"a": SCORES, "b": SCORES[:30]}
    write(tmp_path / "images", dice, None)
    write(tmp_path / "patients", dice, {"a": list(range(40)), "b": list(range(40, 70))})
    one, two = found(tmp_path / "images"), found(tmp_path / "patients")
    assert (one.low, one.high, one.task_intervals) == (two.low, two.high, two.task_intervals)


def test_differences_are_paired_by_patient(tmp_path: Path) -> None:
    """One method is better by 0.1 for half of the patients, and never worse."""
    whose = {"a": np.arange(PATIENTS).repeat(EACH).tolist()}
    gain = np.where(np.arange(PATIENTS) % 2, 0.1, 0.0)
    write(tmp_path, {"a": SCORES.repeat(EACH)}, whose, "mtl")
    write(tmp_path, {"a": (SCORES + gain).repeat(EACH)}, whose, "stl")
    (row,) = compare(tmp_path, [("stl", "mtl")], 4000)
    assert row.value == pytest.approx(0.05)
    assert row.high - row.low == pytest.approx(2 * 1.96 * 0.05 / PATIENTS**0.5, rel=0.05)


def test_runs_must_name_the_same_patients(tmp_path: Path) -> None:
    write(tmp_path, {"a": SCORES[:4]}, {"a": [0, 0, 1, 1]}, "mtl")
    for other in (None, {"a": [0, 1, 1, 1]}):
        write(tmp_path, {"a": SCORES[:4]}, other, "stl")
        with pytest.raises(LoRKDError, match="other patients of the test images than the other runs"):
            summarise(tmp_path, 10)


def test_groups_of_tasks() -> None:
    """c joins a and b, which share nobody; d stays by itself."""
    clusters = clusters_of({"a": [0, 0], "d": [7], "b": [3, 4, 3], "c": [4, 0]})
    assert [(c.count, c.most_images, c.group) for c in clusters.values()] == [(1, 1, 1)] + [(3, 3, 0)] * 3
    assert {name: c.of_image.tolist() for name, c in clusters.items()} == {
        "d": [0], "a": [0, 0], "b": [1, 2, 1], "c": [2, 0]
    }  # fmt: skip


def test_draws_do_not_depend_on_the_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "CHUNK", 300)
    few = Clusters(torch.arange(5), 5, 25)
    many = Clusters(torch.arange(5).repeat_interleave(5), 5, 25)
    one, two = (torch.cat(list(weight_chunks(len(c.of_image), 60, 3, c))) for c in (few, many))
    assert torch.equal(one.repeat_interleave(5, 1), two) and (one.sum(1) == 5).all()
    assert [len(part) for part in weight_chunks(25, 60, 3, many)] == [12] * 5


def test_a_resample_without_an_image_has_no_score() -> None:
    none = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    label = torch.tensor([0, 1])
    assert balanced_accuracy(label, label, 2, none).isnan().tolist() == [True, False]


def test_metrics_of_a_run_resample_patients() -> None:
    """All images of a patient are right or wrong together, so that one patient alone has no interval."""
    probability = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.9, 0.1]])
    label, one = torch.tensor([0, 1, 0, 1]), Clusters(torch.zeros(4, dtype=torch.long), 1, 4)
    figures = classification_figures(probability, label, 50, clusters=one)["accuracy"]
    assert figures == {"value": 0.75, "low": 0.75, "high": 0.75, "n": 4}
    dice = segmentation_figures({"dice": torch.tensor([[0.5], [1.0], [0.0], [0.5]])}, ["organ"], 50, clusters=one)[
        "dice"
    ]
    assert dice == {"value": 0.5, "low": 0.5, "high": 0.5, "n": 4}


def listed() -> DataList:
    tasks = {name: TaskSpec(name, i, {0: "no", 1: "yes"}) for i, name in enumerate("ab")}
    test = [{"image": f"/x/{p}_{n}.png", "label": 0, "task": "ab"[n % 2]} for p in ("p7", "p3") for n in range(3)]
    return DataList("x", Path("/x"), "classification", 2, tasks, [], [], test)


def test_numbers_of_the_test_images_patients() -> None:
    assert patient_numbers(listed()) == {}
    known = with_patients(listed(), ["test"], patient_regex=r"^(p\d)_")
    assert [item["patient"] for item in known.test] == ["patient p7"] * 3 + ["patient p3"] * 3
    assert patient_numbers(known) == {"a": [0, 0, 1, 1], "b": [0, 1]}
    some = dataclasses.replace(known, test=[{"image": "z.png", "label": 1, "task": "b"}, *known.test])
    assert patient_numbers(some) == {"a": [1, 1, 2, 2], "b": [0, 1, 2]}  # the first is nobody's


def test_a_folder_keeps_its_patients(tmp_path: Path) -> None:
    settings = default_settings("classification", 2)
    agree_on_settings(tmp_path, listed(), settings)
    known = with_patients(listed(), ["test"], patient_regex=r"^(p\d)_")
    with pytest.raises(LoRKDError, match="patients of the test images was None, now '"):
        agree_on_settings(tmp_path, known, settings)
    agree_on_settings(tmp_path / "other", known, settings)
    with pytest.raises(LoRKDError, match="patients of the test images was '.*', now None"):
        agree_on_settings(tmp_path / "other", listed(), settings)
