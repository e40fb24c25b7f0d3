"""A study's statistics against cases that can be computed by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hand_made_study import LABELS, one_hot, write_run

from lorkd_monai.errors import LoRKDError
from lorkd_monai.study.statistics import _Study, compare, other_means, scores_under, summarise
from lorkd_monai.study.tables import difference_pairs, difference_table, main_table, study_tables


def test_score_under_weights_by_hand() -> None:
    """Images 0 and 2 are called right. Counting image 1 twice and image 3 not at all: recalls 1/3 and 1."""
    arrays = {"0_probability": one_hot([0, 1, 1, 0]), "0_label": LABELS}
    weights = torch.tensor([[1.0, 1, 1, 1], [1, 2, 1, 0]], dtype=torch.float64)
    assert scores_under(arrays, "classification", weights, 0).tolist() == pytest.approx([0.5, (1 / 3 + 1) / 2])


def test_score_of_masks_leaves_out_images_without_a_value() -> None:
    arrays = {"0_dice": np.array([[0.5, 1.0], [np.nan, np.nan], [np.nan, 0.25]])}
    weights = torch.tensor([[1.0, 1, 1], [2, 5, 1]], dtype=torch.float64)
    assert scores_under(arrays, "segmentation", weights, 0).tolist() == pytest.approx([0.5, (2 * 0.75 + 0.25) / 3])


def test_means_and_deviations_by_hand(tmp_path: Path) -> None:
    write_run(tmp_path, "mtl", 0, [[0, 0, 1, 1], [0, 0, 1, 0]])  # 1 and 0.75
    write_run(tmp_path, "mtl", 1, [[0, 0, 1, 0], [0, 1, 1, 0]])  # 0.75 and 0.5
    row = summarise(tmp_path, 200)[0]
    assert (row.method, row.seeds) == ("mtl", (0, 1))
    assert row.mean == pytest.approx(0.75)
    assert row.sd == pytest.approx(np.std([0.875, 0.625], ddof=1))
    assert row.tasks["a"] == pytest.approx((0.875, np.std([1, 0.75], ddof=1)))
    assert row.low <= row.mean <= row.high


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    write_run(tmp_path, "mtl", 0, [[0, 0, 1, 1], [0, 0, 1, 1]])
    row = summarise(tmp_path, 50)[0]
    assert row.sd is None and row.mean == row.low == row.high == 1.0
    assert "±" not in main_table([row]).splitlines()[2]


def test_the_area_under_the_curve_stands_beside_the_score(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path, "mtl", seed, [[0, 0, 1, 1], [0, 0, 1, 1]])
    rows = summarise(tmp_path, 20)
    assert other_means(rows) == {} and "auroc" not in main_table(rows)
    for value, run in zip((0.5, 0.75), rows[0].runs, strict=True):
        run["figures"]["a"]["auroc"] = {"value": value}
        run["figures"]["b"]["auroc"] = {"value": None}  # of images of one class
    assert other_means(rows) == {"auroc": [0.625]}
    header, _, line = main_table(rows).splitlines()
    assert dict(zip(header.split(" | "), line.split(" | "), strict=True))["mean auroc"] == "0.625"


def test_difference_is_paired(tmp_path: Path) -> None:
    """Two methods that err on the same images differ by nothing, however the images are drawn."""
    for method in ("mtl", "stl"):
        write_run(tmp_path, method, 0, [[0, 1, 1, 0], [0, 1, 0, 1]])
    (row,) = compare(tmp_path, [("mtl", "stl")], 300)
    assert (row.value, row.low, row.high) == (0.0, 0.0, 0.0)


def test_difference_by_hand(tmp_path: Path) -> None:
    """The first is right everywhere; the second calls everything 0, so 0.5 in every resample with both classes."""
    write_run(tmp_path, "lorkd", 0, [[0, 0, 1, 1]] * 2, family="lorkd")
    write_run(tmp_path, "mtl", 0, [[0, 0, 0, 0]] * 2)
    (row,) = compare(tmp_path, lambda a, b: a == "lorkd", 300)
    assert row.value == pytest.approx(0.5)
    assert 0 < row.low <= 0.5 <= row.high <= 1
    assert row.tasks["a"][0] == pytest.approx(0.5)
    assert "**+0.500**" in difference_table([row])


def test_intervals_of_several_comparisons_are_wider(tmp_path: Path) -> None:
    """The corrected interval is the quantiles at 0.025 / 4 of the same resamples."""
    write_run(tmp_path, "lorkd", 0, [[0, 0, 1, 1], [0, 1, 1, 1]], family="lorkd")
    write_run(tmp_path, "mtl", 0, [[0, 1, 1, 0], [0, 0, 1, 0]])
    study, pair = _Study(tmp_path, 1600), [("lorkd", "mtl")]
    scores = [study.mean_scores("full", method, [0]) for method in pair[0]]
    resampled = torch.stack([scores[0][task] - scores[1][task] for task in scores[0]]).mean(0)[1:].numpy()
    (one,), (four,) = compare(tmp_path, pair, 1600), compare(tmp_path, pair, 1600, comparisons=4)
    assert (one.low, one.high) == pytest.approx(tuple(np.quantile(resampled, [0.025, 0.975])))
    assert (four.low, four.high) == pytest.approx(tuple(np.quantile(resampled, [0.00625, 0.99375])))
    assert four.low < one.low < one.value == four.value < one.high < four.high
    assert four.tasks == one.tasks


@pytest.mark.parametrize(
    ("comparisons", "message"),
    [(0, "comparisons must be"), (2.0, "comparisons must be"), (5, "5 comparisons need at least 2000 resamples")],
)
def test_bad_comparisons(tmp_path: Path, comparisons: object, message: str) -> None:
    with pytest.raises(LoRKDError, match=message):
        compare(tmp_path, [("lorkd", "mtl")], 1999, comparisons=comparisons)


def test_only_common_seeds_are_paired(tmp_path: Path) -> None:
    write_run(tmp_path, "lorkd", 0, [[0, 0, 1, 1]] * 2, family="lorkd")
    write_run(tmp_path, "lorkd", 1, [[0, 0, 0, 0]] * 2, family="lorkd")
    write_run(tmp_path, "mtl", 0, [[0, 0, 1, 0]] * 2)
    (row,) = compare(tmp_path, [("lorkd", "mtl")], 50)
    assert row.seeds == (0,) and row.value == pytest.approx(0.25)


def test_teacher_stands_in_every_setting(tmp_path: Path) -> None:
    write_run(tmp_path, "teacher", 0, [[0, 0, 1, 1]] * 2, family="teacher")
    write_run(tmp_path, "lorkd", 0, [[0, 0, 1, 0]] * 2, "few10", "lorkd")
    assert [(r.setting, r.method) for r in summarise(tmp_path, 20)] == [
        ("full", "teacher"), ("few10", "teacher"), ("few10", "lorkd")
    ]  # fmt: skip
    assert difference_pairs(summarise(tmp_path, 20)) == [("lorkd", "teacher")]
    assert "### few10" in study_tables(tmp_path, 20)


def test_runs_with_other_test_images_are_refused() -> None:
    arrays = {"0_probability": one_hot([0, 1]), "0_label": LABELS[:2]}
    with pytest.raises(LoRKDError, match="differ in their test images: 2 and 4"):
        scores_under(arrays, "classification", torch.ones(1, 4, dtype=torch.float64), 0)


def test_test_images_in_another_order_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, "mtl", 0, [[0, 0, 1, 1]] * 2)
    run = write_run(tmp_path, "stl", 0, [[0, 0, 1, 1]] * 2)
    arrays = run.read_arrays()
    run.write(run.read(), {key: value[::-1] for key, value in arrays.items()})
    with pytest.raises(LoRKDError, match="measured on other test images, or in another order"):
        summarise(tmp_path, 10)


def test_the_interval_of_a_task_is_that_of_its_mean_over_seeds(tmp_path: Path) -> None:
    write_run(tmp_path, "mtl", 0, [[0, 1, 1, 1], [0, 0, 1, 1]])
    write_run(tmp_path, "mtl", 1, [[1, 0, 1, 1], [0, 0, 1, 1]])
    (row,) = summarise(tmp_path, 2000)
    low, high = row.task_intervals["a"]
    # b is always right, so that the mean over both tasks moves half as far as a.
    assert (row.low, row.high) == ((low + 1) / 2, (high + 1) / 2) and low < row.tasks["a"][0] == 0.75
    assert row.task_intervals["b"] == (1.0, 1.0)


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoRKDError, match="no finished runs in"):
        summarise(tmp_path)
