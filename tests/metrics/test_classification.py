"""Accuracy, balanced accuracy and AUROC against counting by hand, and their intervals."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from lorkd_monai.errors import LoRKDError
from lorkd_monai.metrics import classification_figures, segmentation_figures
from lorkd_monai.metrics.bootstrap import CHUNK, figures, resampling_weights, weight_chunks
from lorkd_monai.metrics.classification import area_under_roc, balanced_accuracy


def auroc_by_pairs(score: list[float], positive: list[bool]) -> float:
    """The definition: over all pairs of a positive and a negative."""
    wins = [
        1.0 if p > n else 0.5 if p == n else 0.0
        for p, is_positive in zip(score, positive, strict=True)
        if is_positive
        for n, other in zip(score, positive, strict=True)
        if not other
    ]
    return sum(wins) / len(wins) if wins else math.nan


def repeated(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """A resample written out: each value as often as its weight says."""
    return values.repeat_interleave(weights.long())


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_auroc_is_that_of_all_pairs(levels):
    rng = np.random.default_rng(levels)
    score = torch.tensor(rng.integers(levels, size=40) / levels)  # many ties, or none
    positive = torch.tensor(rng.random(40) < 0.3)
    expected = auroc_by_pairs(score.tolist(), positive.tolist())
    assert area_under_roc(score, positive).item() == pytest.approx(expected, abs=1e-12)


def test_auroc_of_resamples_is_that_of_the_samples_written_out():
    score = torch.rand(15).mul(4).round().div(4)
    positive = torch.arange(15) % 3 == 0
    weights = resampling_weights(15, 20)
    values = area_under_roc(score, positive, weights)
    for value, row in zip(values.tolist(), weights, strict=True):
        expected = auroc_by_pairs(repeated(score, row).tolist(), repeated(positive, row).tolist())
        assert value == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_auroc_without_one_of_the_classes_is_nan():
    assert area_under_roc(torch.rand(4), torch.ones(4, dtype=torch.bool)).isnan().all()


def test_balanced_accuracy_by_hand():
    label = torch.tensor([0, 0, 0, 0, 1, 1])
    predicted = torch.tensor([0, 0, 0, 1, 1, 0])
    assert balanced_accuracy(predicted, label, 2).item() == pytest.approx((3 / 4 + 1 / 2) / 2)
    # A class that does not occur does not count.
    assert balanced_accuracy(predicted, label, 5).item() == pytest.approx((3 / 4 + 1 / 2) / 2)
    # The majority class alone is worth 1 / classes, however rare the other.
    assert balanced_accuracy(torch.zeros(6).long(), label, 2).item() == 0.5


def test_balanced_accuracy_of_resamples():
    label, predicted = torch.randint(3, (12,)), torch.randint(3, (12,))
    weights = resampling_weights(12, 10)
    values = balanced_accuracy(predicted, label, 3, weights)
    for value, row in zip(values, weights, strict=True):
        assert value == pytest.approx(balanced_accuracy(repeated(predicted, row), repeated(label, row), 3).item())


def test_figures_of_a_task():
    probability = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.4, 0.6], [0.2, 0.8]])
    figures = classification_figures(probability, torch.tensor([0, 1, 0, 1]), resamples=200)
    assert {name: entry["value"] for name, entry in figures.items()} == {
        "balanced_accuracy": 0.5,
        "accuracy": 0.5,
        "auroc": 0.75,
        "majority_rate": 0.5,
    }
    for entry in figures.values():
        assert entry["n"] == 4
        assert entry.get("low", 0) <= entry["value"] <= entry.get("high", 1)
    assert {"low", "high"} <= figures["auroc"].keys()


def test_auroc_of_several_classes_is_the_mean_of_one_against_the_rest():
    probability, label = torch.rand(30, 3).softmax(1), torch.arange(30) % 3
    expected = np.mean([auroc_by_pairs(probability[:, c].tolist(), (label == c).tolist()) for c in range(3)])
    assert classification_figures(probability, label, 0)["auroc"]["value"] == pytest.approx(expected)
    assert "auroc" not in classification_figures(probability, label % 2, 0)


def test_the_same_resamples_each_time():
    probability, label = torch.rand(20, 2), torch.arange(20) % 2
    one = classification_figures(probability, label)
    torch.manual_seed(1)
    assert classification_figures(probability, label) == one
    assert classification_figures(probability, label, seed=1) != one


def test_resampling_weights_are_draws_with_replacement():
    weights = resampling_weights(10, 500)
    assert weights.shape == (500, 10)
    assert (weights.sum(1) == 10).all()
    assert abs(weights.mean().item() - 1) < 1e-9
    # Binomial(10, 1/10): variance 0.9.
    assert weights.var().item() == pytest.approx(0.9, abs=0.05)


def test_interval_leaves_resamples_without_a_value_out():
    statistics = {
        "some": lambda w: torch.where(w[:, 0] > 0, w[:, 0], torch.nan),
        "none": lambda w: w.sum(1) * torch.nan,
        "all": lambda w: w.sum(1),
    }
    got = figures(statistics, 3, 100)
    assert got["some"]["low"] >= 1
    assert got["none"].keys() == {"value", "n"}
    assert got["all"] == {"value": 3.0, "low": 3.0, "high": 3.0, "n": 3}
    assert figures(statistics, 3, 0)["all"] == {"value": 3.0, "n": 3}


def test_chunks_are_the_rows_of_one_draw(monkeypatch):
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randint(30, (100, 30), generator=generator)  # as one draw of all resamples gives them
    expected = torch.stack([row.bincount(minlength=30) for row in drawn]).double()
    probability, label = torch.rand(30, 3).softmax(1), torch.arange(30) % 3
    scores = {"dice": torch.rand(30, 2)}
    whole = classification_figures(probability, label, 100, 5), segmentation_figures(scores, ["a", "b"], 100, 5)
    assert torch.equal(resampling_weights(30, 100, 5), expected)
    monkeypatch.setattr("lorkd_monai.metrics.bootstrap.CHUNK", 30 * 16)
    assert [len(part) for part in weight_chunks(30, 100, 5)] == [16] * 6 + [4]
    assert torch.equal(resampling_weights(30, 100, 5), expected)
    assert classification_figures(probability, label, 100, 5) == whole[0]
    parts = segmentation_figures(scores, ["a", "b"], 100, 5)
    for name, figure in whole[1].items():
        assert parts[name] == pytest.approx(figure, rel=1e-14)


@pytest.mark.parametrize("count", [1, 100, 47_000, 10**6])
def test_a_chunk_is_bounded_whatever_the_number_of_images(count):
    assert next(weight_chunks(count, 1000)).numel() <= max(CHUNK, 8 * count)


@pytest.mark.slow
def test_memory_of_many_images():
    """47,000 images and 1000 resamples: 376 MB for one matrix of weights alone, and several GB with its copies."""
    code = """
import resource, torch
from lorkd_monai.metrics.classification import classification_figures
probability, label = torch.rand(47000, 2).softmax(1), torch.arange(47000) % 2
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
classification_figures(probability, label)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 600  # MiB


@pytest.mark.parametrize(
    ("probability", "label"),
    [
        (torch.rand(4), torch.zeros(4)),
        (torch.rand(4, 2), torch.zeros(3)),
        (torch.rand(0, 2), torch.zeros(0)),
        (torch.rand(4, 2), torch.zeros(4, 1)),
    ],
)
def test_shapes_that_do_not_fit(probability, label):
    with pytest.raises(LoRKDError, match="expected N × C probabilities and N labels with N > 0"):
        classification_figures(probability, label)
