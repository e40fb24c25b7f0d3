"""Small ShuffleNetV2s: one with torchvision's keys, one with those of the released code and its experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTHS, REPEATS = (4, (8, 12, 16), 20), (2, 3, 2)


def shuffle(left: Tensor, right: Tensor) -> Tensor:
    """Channels of both halves in turn."""
    return torch.stack([left, right], 2).flatten(1, 2)


class Unit(nn.Module):
    """A unit with torchvision's keys."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(
                nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False), nn.BatchNorm2d(inputs),
                nn.Conv2d(inputs, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(),
            )  # fmt: skip
        self.branch2 = nn.Sequential(
            nn.Conv2d(inputs if stride > 1 else half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(),
            nn.Conv2d(half, half, 3, stride, 1, groups=half, bias=False), nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if len(self.branch1):
            return shuffle(self.branch1(x), self.branch2(x))
        kept, x = x.chunk(2, 1)
        return shuffle(kept, self.branch2(x))


class ShuffleNetV2(nn.Module):
    """With torchvision's keys."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        first, stages, last = WIDTHS
        self.conv1 = nn.Sequential(nn.Conv2d(3, first, 3, 2, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU())
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        width = first
        for number, (outputs, repeats) in enumerate(zip(stages, REPEATS, strict=True), 2):
            units = [Unit(width if i == 0 else outputs, outputs, 2 if i == 0 else 1) for i in range(repeats)]
            self.add_module(f"stage{number}", nn.Sequential(*units))
            width = outputs
        self.conv5 = nn.Sequential(nn.Conv2d(width, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU())
        self.fc = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage4(self.stage3(self.stage2(self.maxpool(self.conv1(x)))))
        return self.fc(self.conv5(x).mean((2, 3)))


def shufflenet_v2_x1_0(*, weights: object = None, progress: bool = True, **kwargs: object) -> ShuffleNetV2:
    """The function of torchvision's name."""
    return ShuffleNetV2(**kwargs)


class AuthorsConv(nn.Module):
    """Convolution, norm and activation as `conv` and `bn`; dense convolutions are adapted."""

    def __init__(self, conv: nn.Conv2d, adapt, act: bool = True) -> None:
        super().__init__()
        self.conv = adapt(conv) if conv.groups == 1 else conv
        self.bn = nn.BatchNorm2d(conv.out_channels)
        self.act = act

    def forward(self, x: Tensor, task: int, scale: float) -> Tensor:
        plain = getattr(self.conv, "conv", self.conv)
        weight = plain.weight if plain is self.conv else plain.weight + self.conv.delta(task, scale)
        y = self.bn(nn.functional.conv2d(x, weight, None, plain.stride, plain.padding, 1, plain.groups))
        return y.relu() if self.act else y


class AuthorsUnit(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, adapt) -> None:
        super().__init__()
        half = outputs // 2
        self.stride = stride
        if stride > 1:
            self.branch1 = nn.Sequential(
                AuthorsConv(nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False), adapt, act=False),
                AuthorsConv(nn.Conv2d(inputs, half, 1, bias=False), adapt),
            )
        self.branch2 = nn.Sequential(
            AuthorsConv(nn.Conv2d(inputs if stride > 1 else half, half, 1, bias=False), adapt),
            AuthorsConv(nn.Conv2d(half, half, 3, stride, 1, groups=half, bias=False), adapt, act=False),
            AuthorsConv(nn.Conv2d(half, half, 1, bias=False), adapt),
        )

    def forward(self, x: Tensor, task: int, scale: float) -> Tensor:
        kept, right = (x, x) if self.stride > 1 else (x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :])
        for conv in self.branch1 if self.stride > 1 else ():
            kept = conv(kept, task, scale)
        for conv in self.branch2:
            right = conv(right, task, scale)
        return shuffle(kept, right)


class AuthorsShuffleNet(nn.Module):
    """With the released code's keys: `conv1.conv.conv.weight`, `layers.0.1.branch2.0.conv.lora_A_list.3`, …"""

    def __init__(self, adapt) -> None:
        super().__init__()
        first, stages, last = WIDTHS
        self.conv1 = AuthorsConv(nn.Conv2d(3, first, 3, 2, 1, bias=False), adapt)
        self.layers, width = nn.ModuleList(), first
        for outputs, repeats in zip(stages, REPEATS, strict=True):
            units = [
                AuthorsUnit(width if i == 0 else outputs, outputs, 2 if i == 0 else 1, adapt) for i in range(repeats)
            ]
            self.layers.append(nn.Sequential(*units))
            width = outputs
        self.layers.append(AuthorsConv(nn.Conv2d(width, last, 1, bias=False), adapt))

    def forward(self, x: Tensor, task: int, scale: float) -> Tensor:
        x = nn.functional.max_pool2d(self.conv1(x, task, scale), 3, 2, 1)
        for stage in self.layers:
            for unit in stage if isinstance(stage, nn.Sequential) else [stage]:
                x = unit(x, task, scale)
        return x.mean((2, 3))
