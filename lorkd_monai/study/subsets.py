"""Parts of a data set: some tasks of it, and labels for some of the images only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lorkd_monai.data import TaskDataset
from lorkd_monai.data.samplers import Draw, TaskSampler
from lorkd_monai.losses.task import UNLABELLED

__all__ = ["LabelShareSampler", "Part", "choose_labelled"]


def choose_labelled(items: Sequence[dict], share: float, seed: int) -> list[bool]:
    """Which training images keep their labels: the same part of each class of each task, at least one image of each.

    Segmentation has no classes of images: the part is that of each task. An image without a label has none to keep.

    Args:
        items: of a data list's split.
        share: part of the images.
        seed: another one chooses others.
    """
    groups: dict[tuple, list[int]] = {}
    for i, item in enumerate(items):
        if item["label"] is None:
            continue
        label = item["label"] if isinstance(item["label"], (int, np.integer)) else None
        groups.setdefault((item["task"], label), []).append(i)
    rng = np.random.default_rng([seed, 7])
    chosen = np.zeros(len(items), dtype=bool)
    for _, members in sorted(groups.items(), key=lambda pair: str(pair[0])):
        count = max(1, round(share * len(members)))
        chosen[rng.permutation(members)[:count]] = True
    return chosen.tolist()


class Part(Dataset):
    """Some items of a data set, some of them without their labels.

    Args:
        base: the data set of all tasks.
        tasks: names of the tasks to keep; ``data`` is the data list of these alone.
        labelled: which items of ``base`` have labels; None: all that have one in the data list.
        drop_unlabelled: leave items without labels out, in place of hiding what their labels are.
    """

    def __init__(
        self,
        base: TaskDataset,
        tasks: Iterable[str],
        labelled: Sequence[bool] | None = None,
        drop_unlabelled: bool = False,
    ) -> None:
        self.data = base.data.only(*tasks)
        numbers = {base.data.tasks[name].index: task.index for name, task in self.data.tasks.items()}
        known = [item["label"] is not None for item in base.items] if labelled is None else list(labelled)
        self.base = base
        self.indices = [
            i for i, task in enumerate(base.task_of_item) if task in numbers and (known[i] or not drop_unlabelled)
        ]
        self.labelled = [known[i] for i in self.indices]
        self.task_of_item = [numbers[base.task_of_item[i]] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, draw: int | Draw) -> dict[str, Tensor]:
        index, seed = draw if isinstance(draw, tuple) else (draw, draw)
        item = self.base[Draw(self.indices[index], seed)]
        if not self.labelled[index]:
            item = {**item, "label": torch.full_like(item["label"], UNLABELLED)}
        return {**item, "task": torch.tensor(self.task_of_item[index])}


class LabelShareSampler(TaskSampler):
    """A `TaskSampler` whose draws of each task hold a fixed part of labelled images, where few have labels.

    Args:
        part: the data set.
        share: part of each task's draws that is drawn from its labelled images; the rest comes from all of them.
        kwargs: see `TaskSampler`.
    """

    def __init__(self, part: Part, share: float, **kwargs: object) -> None:
        super().__init__(part.task_of_item, **kwargs)
        labelled = np.asarray(part.labelled)
        self.share = share
        self._labelled = [items[labelled[items]] for items in self.items_of_task]

    def draw(self, rng: np.random.Generator, counts: Sequence[int]) -> list[np.ndarray]:
        """Return the items that each task gives to one epoch."""
        drawn = super().draw(rng, counts)
        for own, labelled in zip(drawn, self._labelled, strict=True):
            count = round(self.share * len(own))
            rounds = -(-count // len(labelled)) if len(labelled) else 0
            if rounds:
                own[:count] = np.concatenate([rng.permutation(labelled) for _ in range(rounds)])[:count]
        return drawn
