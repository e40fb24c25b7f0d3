"""Random changes of a whole batch at once, the same for the same seed and iteration."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import affine_grid, grid_sample

from lorkd_monai.errors import LoRKDError

__all__ = ["BatchAugment"]


class BatchAugment:
    """Rotate, scale, shift and flip images together with their masks, and change contrast, brightness and noise.

    The changes depend only on ``seed`` and the ``iteration`` of the call, so a resumed training sees the same as one
    without a break. Each sample of a batch is changed in its own way. Images are float B×C×H×W[×D] in 0..1 and stay
    in 0..1; masks are B×1×H×W[×D] and take the nearest voxel. Positions from outside the image become 0. A mask of -1
    only, of an image without a label, stays so.

    Args:
        spatial_dims: 2 or 3.
        rotate: largest angle, in degrees (3D: about each axis).
        scale: largest change of size; 0.1 is 10 % up or down.
        translate: largest shift, as a part of the side.
        flip_axes: spatial axes that are flipped for half of the samples. None by default: a flip is wrong wherever
            left and right (or front and back) carry meaning.
        contrast: largest change of the contrast about the image's mean.
        brightness: largest change of all values.
        noise: standard deviation of Gaussian noise; drawing it costs as much as all the rest.
        probability: of the geometric change of a sample, and independently of its change of intensity.
        seed: any whole number of at least 0.

    Raises:
        LoRKDError: for a value out of its range.

    Example::

        augment = BatchAugment(2, rotate=15, flip_axes=(1,), seed=0)
        image, mask = augment(torch.rand(8, 3, 64, 64), torch.zeros(8, 1, 64, 64).long(), iteration=12)
    """

    def __init__(
        self,
        spatial_dims: int,
        rotate: float = 10.0,
        scale: float = 0.1,
        translate: float = 0.05,
        flip_axes: Sequence[int] = (),
        contrast: float = 0.1,
        brightness: float = 0.1,
        noise: float = 0.0,
        probability: float = 0.5,
        seed: int = 0,
    ) -> None:
        if spatial_dims not in (2, 3):
            raise LoRKDError(f"spatial_dims must be 2 or 3, got {spatial_dims!r}.")
        amounts = {"rotate": rotate, "translate": translate, "brightness": brightness, "noise": noise, "seed": seed}
        for name, value in amounts.items():
            if value < 0:
                raise LoRKDError(f"{name} must be at least 0, got {value!r}.")
        for name, value in (("scale", scale), ("contrast", contrast)):
            if not 0 <= value < 1:
                raise LoRKDError(f"{name} must be at least 0 and less than 1, got {value!r}.")
        if not 0 <= probability <= 1:
            raise LoRKDError(f"probability must be in 0..1, got {probability!r}.")
        if any(axis not in range(spatial_dims) for axis in flip_axes):
            raise LoRKDError(f"flip_axes must be axes in 0..{spatial_dims - 1}, got {tuple(flip_axes)}.")
        self.spatial_dims, self.flip_axes = spatial_dims, tuple(flip_axes)
        self.probability, self.seed = probability, seed
        self.rotate, self.scale, self.translate = math.radians(rotate), scale, translate
        self.contrast, self.brightness, self.noise = contrast, brightness, noise

    @torch.no_grad()
    def __call__(
        self, image: torch.Tensor, label: torch.Tensor | None = None, iteration: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the changed images and masks (None for none); the given tensors are not changed.

        Raises:
            LoRKDError: for shapes that do not fit.
        """
        if image.ndim != self.spatial_dims + 2:
            raise LoRKDError(
                f"expected images of {self.spatial_dims + 2} axes (B×C×…), got shape {tuple(image.shape)}."
            )
        if label is not None and (len(label), *label.shape[2:]) != (len(image), *image.shape[2:]):
            raise LoRKDError(f"expected masks of {tuple(image.shape)} with 1 channel, got {tuple(label.shape)}.")
        state = np.random.SeedSequence([self.seed, iteration]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]) >> 1)
        image = image.clone()
        unlabelled = None if label is None else (label == -1).flatten(1).all(1)
        label = None if label is None else label.clone()
        self._flip(image, label, generator)
        self._warp(image, label, generator)
        self._change_intensity(image, generator)
        if label is not None:
            label[unlabelled] = -1  # the zeros from outside the mask are no label there
        return image, label

    def _chosen(self, count: int, probability: float, generator: torch.Generator) -> torch.Tensor:
        return torch.nonzero(torch.rand(count, generator=generator) < probability).flatten()

    def _flip(self, image: torch.Tensor, label: torch.Tensor | None, generator: torch.Generator) -> None:
        for axis in self.flip_axes:
            chosen = self._chosen(len(image), 0.5, generator).to(image.device)
            for tensor in (image, label):
                if tensor is not None and len(chosen):
                    tensor[chosen] = tensor[chosen].flip(axis + 2)

    def _warp(self, image: torch.Tensor, label: torch.Tensor | None, generator: torch.Generator) -> None:
        chosen = self._chosen(len(image), self.probability, generator)
        matrices = self._matrices(len(chosen), image.shape[2:], generator)
        if not len(chosen) or not (self.rotate or self.scale or self.translate):
            return
        chosen, matrices = chosen.to(image.device), matrices.to(image.device, image.dtype)
        grid = affine_grid(matrices, [len(chosen), 1, *image.shape[2:]], align_corners=False)
        image[chosen] = grid_sample(image[chosen], grid, mode="bilinear", align_corners=False)
        if label is not None:
            moved = grid_sample(label[chosen].to(image.dtype), grid, mode="nearest", align_corners=False)
            label[chosen] = moved.round().to(label.dtype)

    def _matrices(self, count: int, size: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """Return count×d×(d+1) matrices from output to input positions in torch's -1..1, last axis first."""
        dims = self.spatial_dims

        def uniform(amount: float, *shape: int) -> torch.Tensor:
            return (torch.rand(count, *shape, generator=generator, dtype=torch.float64) * 2 - 1) * amount

        turn = torch.eye(dims, dtype=torch.float64).expand(count, dims, dims)
        for first in range(dims):
            for second in range(first + 1, dims):
                angle = uniform(self.rotate)
                plane = torch.eye(dims, dtype=torch.float64).repeat(count, 1, 1)
                plane[:, first, first] = plane[:, second, second] = angle.cos()
                plane[:, first, second], plane[:, second, first] = -angle.sin(), angle.sin()
                turn = turn @ plane
        turn = turn / (1 + uniform(self.scale, 1, 1))
        # Positions are relative to each side: a rotation of an image that is not square must not shear it.
        sides = torch.tensor(list(size)[::-1], dtype=torch.float64)
        turn = turn * sides / sides[:, None]
        return torch.cat([turn, 2 * uniform(self.translate, dims, 1)], dim=2)

    def _change_intensity(self, image: torch.Tensor, generator: torch.Generator) -> None:
        count, ones = len(image), [1] * (image.ndim - 1)
        chosen = (torch.rand(count, generator=generator) < self.probability).to(image.dtype).view(-1, *ones)
        gain = 1 + chosen * self.contrast * (torch.rand(count, *ones, generator=generator) * 2 - 1)
        shift = chosen * self.brightness * (torch.rand(count, *ones, generator=generator) * 2 - 1)
        seed = int(torch.randint(2**62, (1,), generator=generator))
        if not chosen.any() or not (self.contrast or self.brightness or self.noise):
            return
        chosen, gain, shift = (t.to(image.device, image.dtype) for t in (chosen, gain, shift))
        mean = image.mean(dim=tuple(range(1, image.ndim)), keepdim=True)
        image.mul_(gain).add_(mean * (1 - gain) + shift)  # gain 1 and shift 0 leave a sample as it was
        if self.noise:
            on_device = torch.Generator(device=image.device).manual_seed(seed)
            noise = torch.randn(image.shape, generator=on_device, device=image.device, dtype=image.dtype)
            image.addcmul_(noise, chosen, value=self.noise)
        image.clamp_(0, 1)
