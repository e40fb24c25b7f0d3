"""The networks of a study, all called with (image, task): students, one network for each task, the teacher."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lorkd_monai.data import DataList
from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import LoRKDNet, TaskChannels
from lorkd_monai.study.settings import StudySettings
from lorkd_monai.teachers.teacher import Teacher

__all__ = [
    "MeanNetwork",
    "OneEach",
    "build_student",
    "choose_ranks",
    "members_of",
    "teacher_of",
    "teacher_view",
]


def choose_ranks(settings: StudySettings, counts: Mapping[str, int]) -> int | dict[str, int]:
    """The rank of each task's expert; ``"imbalanced"``: 2, 4 or 8 for the smaller, middle and larger tasks.

    Args:
        settings: with ``rank``.
        counts: training images of each task.

    Raises:
        LoRKDError: no rank for a task.
    """
    if isinstance(settings.rank, Mapping):
        missing = [name for name in counts if name not in settings.rank]
        if missing:
            raise LoRKDError(
                f"rank: expected one for each of {', '.join(counts)}, got {dict(settings.rank)}, without {missing[0]!r}"
            )
        return {name: settings.rank[name] for name in counts}
    if settings.rank != "imbalanced":
        return settings.rank
    order = sorted(counts, key=lambda name: counts[name])
    return {name: (2, 4, 8)[3 * place // len(order)] for place, name in enumerate(order)}


def build_student(settings: StudySettings, data: DataList, experts: bool, seed: int) -> LoRKDNet:
    """A student with a head for each task of the data list, and with low-rank experts or without.

    The backbone starts from the same weights for each method of a seed.
    """
    torch.manual_seed(seed)
    counts = {name: row["training"] for name, row in data.counts().items()}
    return LoRKDNet(
        dict(settings.backbone),
        data.num_classes,
        rank=choose_ranks(settings, counts) if experts else 0,
        alpha=settings.alpha,
        layout=settings.layout,
        norm=settings.norm if len(data.tasks) > 1 else "shared",
    )


class OneEach(nn.Module):
    """Networks of one task each, called as one network of all of them.

    Args:
        networks: task -> what takes (image, 0) and gives the task's channels, in the order of the tasks.
        num_classes: task -> channels.
    """

    def __init__(self, networks: Mapping[str, nn.Module], num_classes: Mapping[str, int]) -> None:
        super().__init__()
        self.tasks, self.num_classes = list(networks), dict(num_classes)
        self.networks = nn.ModuleList(networks.values())

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        """B × C_max × …, -inf past each sample's own channels."""
        task = task.reshape(-1).expand(x.shape[0])
        result: Tensor | None = None
        for index in task.unique().tolist():
            rows = (task == index).nonzero()[:, 0]
            y = self.networks[index](x[rows], torch.zeros(len(rows), dtype=torch.long, device=x.device))
            if result is None:
                shape = (x.shape[0], max(self.num_classes.values()), *y.shape[2:])
                result = y.new_full(shape, float("-inf"))
            result[rows, : y.shape[1]] = y
        if result is None:
            raise LoRKDError("the batch is empty")
        return result


class MeanNetwork(nn.Module):
    """The mean of several networks' outputs."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        """The mean."""
        return torch.stack([network(x) for network in self.networks]).mean(0)


def members_of(view: TaskChannels | Teacher) -> list[nn.Module]:
    """The plain networks that a foundation model is made of."""
    return list(view.network.networks) if isinstance(view.network, MeanNetwork) else [view.network]


def teacher_view(settings: StudySettings, data: DataList, states: Sequence[Mapping[str, Tensor]]) -> TaskChannels:
    """The foundation model from the weights of its members."""
    members = []
    for state in states:
        view = TaskChannels.build(settings.teacher_backbone, data.num_classes)
        view.load_state_dict(state)
        members.append(view.network)
    return TaskChannels(members[0] if len(members) == 1 else MeanNetwork(members), data.num_classes)


def teacher_of(view: TaskChannels, tasks: Sequence[str]) -> Teacher:
    """The frozen teacher of some of the tasks that a foundation model knows, numbered in the order of ``tasks``."""
    starts, start = {}, 0
    for name, count in view.num_classes.items():
        starts[name] = start
        start += count
    classes = {name: view.num_classes[name] for name in tasks}
    channels = {name: list(range(starts[name], starts[name] + n)) for name, n in classes.items()}
    return Teacher(copy.deepcopy(view.network), channels, classes)
