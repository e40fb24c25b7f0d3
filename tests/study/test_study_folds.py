"""Cross-validation in a study: what stands in a fold, patients kept together, test images left alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lorkd_monai.cli.study import study
from lorkd_monai.data import DataList, TaskSpec
from lorkd_monai.errors import LoRKDError
from lorkd_monai.study.files import RunFile, read_runs
from lorkd_monai.study.folds import fold_of, folds_of
from lorkd_monai.study.patients import with_patients

TASKS = {
    "a": TaskSpec("a", 0, {0: "no", 1: "yes"}),
    "b": TaskSpec("b", 1, {0: "no", 1: "yes"}),
}

BOTH = ["training", "validation"]


def arrays(split: str, counts: dict[tuple[str, int], int]) -> list[dict]:
    return [
        {"image": np.full((2, 2), i), "label": np.int64(label), "task": task, "from": split}
        for (task, label), n in counts.items()
        for i in range(n)
    ]


def of_arrays() -> DataList:
    training = arrays("training", {("a", 0): 40, ("a", 1): 8, ("b", 0): 12, ("b", 1): 12})
    validation = arrays("validation", {("a", 0): 10, ("a", 1): 2, ("b", 0): 3, ("b", 1): 3})
    return DataList("x", Path(), "classification", 2, TASKS, training, validation, arrays("test", {("a", 0): 9}))


def of_files() -> DataList:
    """Masks of ten patients: six images of each in one task, one of each in the other."""
    names = [("a", p, n) for p in range(10) for n in range(6)] + [("b", p, 0) for p in range(10)]
    items = [{"image": f"/x/{t}_{p:02}_{n}.png", "label": f"/y/{t}_{p:02}_{n}.png", "task": t} for t, p, n in names]
    return DataList("x", Path("/x"), "segmentation", 2, TASKS, items[:50], items[50:], [])


@pytest.mark.parametrize("folds", [3, 5])
def test_each_image_is_measured_once_and_classes_are_spread(folds: int) -> None:
    data = of_arrays()
    number = folds_of(data, folds)
    parts = [fold_of(data, number, folds, fold) for fold in range(folds)]
    ids = sorted(id(item) for item in [*data.training, *data.validation])
    assert sorted(id(item) for part in parts for item in part.test) == ids
    for part in parts:
        assert sorted(id(item) for item in [*part.training, *part.validation, *part.test]) == ids
        for key, n in {("a", 0): 50, ("a", 1): 10, ("b", 0): 15, ("b", 1): 15}.items():
            own = Counter((item["task"], int(item["label"])) for item in part.test)
            assert n // folds <= own[key] <= -(-n // folds)
    assert [id(i) for i in parts[0].validation] == [id(i) for i in parts[1].test]
    assert [id(i) for i in parts[-1].validation] == [id(i) for i in parts[0].test]
    assert parts[1].name == f"x, fold 1 of {folds}"


def test_a_patient_is_in_one_fold_over_all_tasks() -> None:
    data = of_files()
    number = folds_of(with_patients(data, BOTH, patient_regex=r"_(\d+)_"), 5)
    items = [*data.training, *data.validation]
    of_patient: dict[str, set[int]] = {}
    for item, fold in zip(items, number):
        of_patient.setdefault(item["image"].split("_")[1], set()).add(fold)
    assert len(of_patient) == 10 and all(len(found) == 1 for found in of_patient.values())
    assert Counter(number) == dict.fromkeys(range(5), 14)
    assert number == folds_of(with_patients(data, BOTH, patient_regex=r"_(\d+)_"), 5)


def test_the_division_is_that_of_earlier_versions() -> None:
    """Folds that were begun go on with the same images."""
    assert folds_of(of_arrays(), 3)[:12] == [0, 0, 0, 2, 0, 2, 2, 2, 0, 0, 1, 2]
    assert folds_of(of_files(), 5)[:12] == [2, 4, 4, 3, 4, 0, 3, 1, 0, 2, 2, 3]


def test_patients_from_a_table(tmp_path: Path) -> None:
    data = of_files()
    rows = [f"{Path(i['image']).name},{i['image'].split('_')[1]}" for i in [*data.training, *data.validation]]
    table = tmp_path / "patients.csv"
    table.write_text("image,patient\n" + "\n".join(rows))
    assert with_patients(data, BOTH, table) == with_patients(data, BOTH, patient_regex=r"_(\d+)_")
    assert with_patients(data, BOTH) is data


def test_what_can_not_be_divided() -> None:
    for folds in (2, 0, 3.0, True):
        with pytest.raises(LoRKDError, match="folds must be a whole number of at least 3"):
            folds_of(of_arrays(), folds)
    with pytest.raises(LoRKDError, match="fold: expected numbers from 0 to 2, got 3"):
        fold_of(of_arrays(), folds_of(of_arrays(), 3), 3, 3)
    with pytest.raises(LoRKDError, match="images of task 'a' are in an .npz file"):
        with_patients(of_arrays(), BOTH, patient_regex="x")
    with pytest.raises(LoRKDError, match="finds nothing in the file name"):
        with_patients(of_files(), BOTH, patient_regex="subject")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"folds": 2}, "folds must be"),
        ({"folds": "3"}, "folds must be"),
        ({"folds": 4, "fold": "0,4"}, "fold: expected numbers from 0 to 3, got 4"),
        ({"folds": 4, "fold": "a"}, "fold: expected whole numbers"),
        ({"fold": 0}, "give the number of --folds"),
        ({"folds": 3, "unseen": "all", "methods": "lorkd"}, "unseen and folds: expected one of them"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(LoRKDError, match=message):
        study(str(tmp_path / "out"), quick=True, **arguments)
    assert not (tmp_path / "out").exists()


def test_the_plan_names_the_folds(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    study(str(tmp_path), methods="mtl", settings="full", seeds=1, folds=3, fold="0,2", plan_only=True)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["fold 0", "fold 2"]


@pytest.mark.slow
def test_recipes_on_folds(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A data list of another name, its test images gone: they take no part."""
    out = tmp_path / "out"
    study(str(out), quick=True, methods="mtl", settings="full", device="cpu", epochs=1)  # makes the phantoms
    listed = out / "phantoms" / "dataset.json"
    listed.rename(listed.with_name("other.json"))
    capsys.readouterr()
    given = {
        "dataset_dir": str(listed.with_name("other.json")), "methods": "mtl,few", "settings": "full", "seeds": 0,
        "variants": "{few: {base: mtl, tasks_per_batch: 2}}", "folds": 3, "device": "cpu", "epochs": 1,
        "images_per_epoch": 64, "batch_size": 16,
    }  # fmt: skip
    study(str(tmp_path / "cv"), fold="0,2", **given)
    said = capsys.readouterr().out
    assert "| setting | method | mean of folds (± sd over folds) | fold_0 | fold_2 |" in said
    assert sorted(p.name for p in (tmp_path / "cv").iterdir()) == ["fold_0", "fold_2"]
    means = {r.method: r.read()["mean"] for r in read_runs(tmp_path / "cv" / "fold_2")}
    assert set(means) == {"mtl", "few"} and f"{means['few']:.3f} |" in said
    study(str(tmp_path / "cv"), **given)
    assert len(list(map(RunFile.read, read_runs(tmp_path / "cv" / "fold_1")))) == 2
    assert "fold 0: 2 runs, 2 done already" in capsys.readouterr().out
