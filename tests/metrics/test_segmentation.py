"""Dice, surface Dice and Hausdorff distance on masks that can be checked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lorkd_monai.errors import LoRKDError
from lorkd_monai.metrics import case_scores, segmentation_figures

pytest.importorskip("scipy")


def square(first: int, last: int, size: int = 16) -> torch.Tensor:
    mask = torch.zeros(size, size, dtype=torch.long)
    mask[first:last, 4:8] = 1
    return mask


def test_equal_masks():
    scores = case_scores(square(2, 6), square(2, 6), 2)
    assert scores["dice"].tolist() == [1] and scores["nsd"].tolist() == [1] and scores["hd95"].tolist() == [0]


def test_dice_by_hand():
    # 4×4 against 4×4, shifted by two rows: 8 of 16 and 16 are common.
    assert case_scores(square(2, 6), square(4, 8), 2)["dice"].item() == pytest.approx(2 * 8 / 32)


def test_distances_are_in_the_unit_of_spacing():
    predicted, label = square(2, 6), square(2, 9)
    assert case_scores(predicted, label, 2)["hd95"].item() == pytest.approx(3)
    assert case_scores(predicted, label, 2, spacing=(2.5, 1))["hd95"].item() == pytest.approx(7.5)
    assert case_scores(predicted, label, 2, spacing=(1, 2.5))["hd95"].item() == pytest.approx(3)
    strict = case_scores(predicted, label, 2, tolerance=1.0)["nsd"].item()
    assert 0 < strict < 1
    assert case_scores(predicted, label, 2, tolerance=3.0)["nsd"].item() == 1
    assert case_scores(predicted, label, 2, tolerance=3.0, spacing=(2.5, 1))["nsd"].item() < 1


def test_volumes():
    predicted = torch.zeros(8, 8, 6, dtype=torch.long)
    label = predicted.clone()
    predicted[2:5, 2:5, 1:3], label[2:5, 2:5, 1:5] = 1, 1
    scores = case_scores(predicted, label, 2, spacing=(1, 1, 4))
    assert scores["dice"].item() == pytest.approx(2 * 18 / 54)
    assert scores["hd95"].item() == pytest.approx(8)


def test_empty_masks():
    nothing, something = torch.zeros(16, 16, dtype=torch.long), square(2, 6)
    missed, invented = case_scores(nothing, something, 2), case_scores(something, nothing, 2)
    for scores in (missed, invented):
        assert (scores["dice"].item(), scores["nsd"].item(), scores["hd95"].item()) == (0, 0, math.inf)
    assert all(value.isnan().all() for value in case_scores(nothing, nothing, 2).values())
    only_dice = case_scores(nothing, something, 3, surface=False)
    assert only_dice.keys() == {"dice"}
    assert only_dice["dice"][0] == 0 and only_dice["dice"][1].isnan()


def test_each_class_by_itself():
    label = square(2, 6) + 2 * square(8, 12)
    scores = case_scores(square(2, 6), label, 3)
    assert scores["dice"].tolist() == [1, 0]
    assert scores["hd95"].tolist() == [0, math.inf]


def test_shapes_that_differ():
    with pytest.raises(LoRKDError, match=r"prediction \(4, 4\) and label \(4, 5\) differ in shape"):
        case_scores(torch.zeros(4, 4), torch.zeros(4, 5), 2)


def test_figures_leave_out_what_is_in_neither_mask():
    scores = {"dice": torch.tensor([[0.5, math.nan], [1.0, 0.0], [math.nan, math.nan]])}
    figures = segmentation_figures(scores, ["organ", "bone"], resamples=300)
    assert figures["dice"]["value"] == pytest.approx((0.5 + 0.5) / 2)
    assert figures["dice"]["n"] == 2
    assert figures["dice organ"]["value"] == pytest.approx(0.75)
    assert (figures["dice organ"]["n"], figures["dice bone"]["n"]) == (2, 1)
    assert figures["dice organ"]["low"] >= 0.5 and figures["dice organ"]["high"] <= 1
    assert segmentation_figures({"dice": scores["dice"][:, :1]}, ["organ"]).keys() == {"dice"}


def test_infinite_distances_are_left_out_and_counted():
    figures = segmentation_figures({"hd95": torch.tensor([[1.0], [math.inf], [2.0]])}, ["organ"])
    assert (figures["hd95"]["value"], figures["hd95"]["n"]) == (1.5, 2)
    assert figures["hd95"]["low"] >= 1 and figures["hd95"]["high"] <= 2


def test_a_score_without_any_value_is_missing():
    scores = {"dice": torch.tensor([[0.0, math.nan]]), "hd95": torch.tensor([[math.inf, math.nan]])}
    assert segmentation_figures(scores, ["organ", "bone"]).keys() == {"dice", "dice organ"}
