"""Batched augmentation: the same again for the same seed, image and mask together, and nothing out of range."""

from __future__ import annotations

import pytest
import torch

from lorkd_monai.errors import LoRKDError
from lorkd_monai.transforms import BatchAugment

OFF = {"rotate": 0, "scale": 0, "translate": 0, "contrast": 0, "brightness": 0, "noise": 0}


def disc(shape):
    axes = torch.meshgrid(*[torch.linspace(-1, 1, n) for n in shape], indexing="ij")
    return (sum(x**2 for x in axes) < 0.4).float()[None, None]


@pytest.mark.parametrize("dims", [2, 3])
def test_depends_on_seed_and_iteration_alone(dims):
    image = torch.rand(6, 2, *[12, 10, 8][:dims])
    mask = (image[:, :1] > 0.5).long()
    make = lambda seed: BatchAugment(dims, flip_axes=range(dims), noise=0.1, probability=0.8, seed=seed)  # noqa: E731
    first = make(1)(image, mask, iteration=5)
    torch.rand(3)  # the global random state plays no part
    again = make(1)(image, mask, iteration=5)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], make(1)(image, mask, iteration=6)[0])
    assert not torch.equal(first[0], make(2)(image, mask, iteration=5)[0])


def test_inputs_stay_and_outputs_keep_shape_type_and_range():
    image, mask = torch.rand(8, 3, 20, 14), torch.randint(0, 4, (8, 1, 20, 14))
    before = image.clone(), mask.clone()
    augment = BatchAugment(2, brightness=0.5, contrast=0.5, noise=0.3, rotate=40, probability=1.0)
    out, out_mask = augment(image, mask)
    assert torch.equal(image, before[0]) and torch.equal(mask, before[1])
    assert out.shape == image.shape and out.dtype == image.dtype and out.min() >= 0 and out.max() <= 1
    assert (
        out_mask.shape == mask.shape
        and out_mask.dtype == mask.dtype
        and set(out_mask.unique().tolist()) <= {0, 1, 2, 3}
    )


@pytest.mark.parametrize("dims", [2, 3])
def test_image_and_mask_move_together(dims):
    shape = (48, 40, 36)[:dims]
    mask = disc(shape).repeat(10, *[1] * (dims + 1))
    mask[:, :, : shape[0] // 2] = 0
    settings = {**OFF, "rotate": 60, "scale": 0.3, "translate": 0.2}
    image, moved = BatchAugment(dims, **settings, flip_axes=(0,), probability=1.0)(mask.clone(), mask.long())
    assert ((image > 0.5) == (moved == 1)).float().mean() > 0.98
    assert not torch.equal(moved, mask.long())


def test_rotation_of_an_image_that_is_not_square_keeps_shapes():
    """A disc of voxels, turned by 90° at most, stays the same disc; relative positions would make an ellipse of it."""
    rows, columns = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(32) - 15.5, indexing="ij")
    image = ((rows**2 + columns**2) < 12**2).float()[None, None].repeat(8, 1, 1, 1)
    out, _ = BatchAugment(2, **{**OFF, "rotate": 90}, probability=1.0)(image)
    assert ((out > 0.5) == (image > 0.5)).float().mean() > 0.99


def test_flip_is_of_the_axis_that_is_named():
    image = torch.arange(12.0).reshape(1, 1, 3, 4) / 12
    seen = {tuple(BatchAugment(2, **OFF, flip_axes=(1,))(image, iteration=i)[0].flatten().tolist()) for i in range(20)}
    assert seen == {tuple(image.flatten().tolist()), tuple(image.flip(3).flatten().tolist())}


def test_probability_zero_changes_nothing():
    image = torch.rand(4, 1, 8, 8)
    out, mask = BatchAugment(2, noise=1.0, probability=0.0)(image)
    assert torch.equal(out, image) and mask is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spatial_dims": 4}, "spatial_dims must be 2 or 3"),
        ({"rotate": -1}, "rotate must be at least 0"),
        ({"scale": 1.5}, "scale must be .* less than 1"),
        ({"probability": 2}, "probability must be in 0..1"),
        ({"flip_axes": (2,)}, r"flip_axes must be axes in 0\.\.1"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(LoRKDError, match=message):
        BatchAugment(**{"spatial_dims": 2, **arguments})


def test_wrong_shapes_are_refused():
    augment = BatchAugment(2)
    with pytest.raises(LoRKDError, match="expected images of 4 axes"):
        augment(torch.rand(1, 8, 8))
    with pytest.raises(LoRKDError, match="expected masks"):
        augment(torch.rand(2, 1, 8, 8), torch.zeros(2, 1, 8, 9))
