"""How a teacher is shown the student's images: axes there and back, values, and what a user says of them."""

from __future__ import annotations

import itertools

import pytest
import torch

from lorkd_monai.errors import LoRKDError
from lorkd_monai.teachers.intensity import Axes, TeacherView, given_steps, values_of

RANGES = [(-100.0, 300.0), (0.0, 255.0)]


@pytest.mark.parametrize("dims", [2, 3])
def test_axes_there_and_back(dims):
    x = torch.rand(2, 1, *(3, 4, 5)[:dims])
    for order in itertools.permutations(range(dims)):
        for flipped in ((), (0,), (dims - 1,), tuple(range(dims))):
            axes = Axes(order, flipped)
            turned = axes.turned(x)
            assert turned.shape[2:] == tuple(x.shape[a + 2] for a in order)
            assert torch.equal(axes.back(turned), x)


def test_axes_by_hand():
    x = torch.tensor([[1, 2, 3], [4, 5, 6]])[None, None]
    assert Axes((1, 0)).turned(x).tolist() == [[[[1, 4], [2, 5], [3, 6]]]]
    assert Axes((0, 1), (1,)).turned(x).tolist() == [[[[3, 2, 1], [6, 5, 4]]]]
    assert Axes((1, 0), (0,)).turned(x).tolist() == [[[[3, 6], [2, 5], [1, 4]]]]


@pytest.mark.parametrize("own", [(-1024.0, 3071.0), (0.0, 255.0), (-160.0, 240.0), (0.0, 65535.0), (0.0, 1.0)])
def test_whole_numbers_come_back_whole(own):
    low, high = own
    values = torch.linspace(low, high, 1001).round()
    assert torch.equal(values_of((values - low) / (high - low), own), values)


def test_values_between_stay_between():
    values = torch.rand(1000) * 2000 - 1000
    back = values_of((values + 1000) / 2000, (-1000.0, 1000.0))
    torch.testing.assert_close(back, values, rtol=0, atol=1e-3)
    assert (back != back.round()).float().mean() > 0.99


def test_each_row_has_its_tasks_values():
    x = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    view = TeacherView(given_steps({"range": [-100, 100], "to": [-1, 1]}), RANGES)
    torch.testing.assert_close(view(x, [0, 1]).flatten(), torch.tensor([-1.0, 2.55]))
    same = TeacherView(given_steps("same"), RANGES)
    assert torch.equal(same(x, [0, 1]), x)


def test_zscore_is_of_each_image():
    x = torch.rand(3, 1, 6, 6)
    shown = TeacherView(given_steps("zscore"), RANGES)(x.clone(), [0, 1, 0])
    expected = (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(shown, expected, rtol=1e-4, atol=1e-5)
    flat = TeacherView(given_steps("zscore"), RANGES)(torch.ones(1, 1, 4, 4), [0])
    assert torch.equal(flat, torch.zeros(1, 1, 4, 4))


def test_answers_are_turned_and_scores_are_not():
    view = TeacherView(axes=Axes((1, 0), (1,)))
    x = torch.rand(2, 1, 4, 6)
    assert torch.equal(view.answer(view(x, [0, 0]), x), x)
    scores = torch.rand(2, 5)
    assert view.answer(scores, x) is scores


@pytest.mark.parametrize("intensity", ["other", {"to": [0, 1]}, {"range": [0]}, {"range": [0, 1], "by": 2}, 3])
def test_given_refused(intensity):
    with pytest.raises(LoRKDError, match="intensity must be 'auto', 'same', 'zscore'"):
        given_steps(intensity)


def test_given_empty_range_refused():
    with pytest.raises(LoRKDError, match="range is empty"):
        given_steps({"range": [2, 2]})
