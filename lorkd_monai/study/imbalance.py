"""The setting of unequal tasks: half of the tasks keep a few training images, and the others keep all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from lorkd_monai.data import DataList
from lorkd_monai.errors import LoRKDError

__all__ = ["imbalanced", "kept_indices", "small_tasks"]

_SEED = 0  # of the protocol: the same tasks and images for all methods and seeds of the runs


def small_tasks(names: Sequence[str]) -> list[str]:
    """The half of the tasks (rounded down) that keep few images, in the order of the tasks.

    Raises:
        LoRKDError: there are fewer than two tasks.
    """
    if len(names) < 2:
        raise LoRKDError(f"the setting imbalance needs two tasks, there is {', '.join(names)} alone")
    chosen = np.random.default_rng([_SEED, 11]).permutation(len(names))[: len(names) // 2]
    return [name for i, name in enumerate(names) if i in chosen]


def kept_indices(data: DataList, kept: int) -> list[int]:
    """Which training images are there: all of the large tasks, ``kept`` labelled ones of each small task.

    The classes of a small task keep their shares, but at least one image each. A task that has fewer labelled images
    keeps them all.
    """
    chosen = set(range(len(data.training)))
    for name in small_tasks(list(data.tasks)):
        own = [i for i, item in enumerate(data.training) if item["task"] == name]
        chosen -= set(own)
        chosen |= set(_stratified([i for i in own if data.training[i]["label"] is not None], data, name, kept))
    return sorted(chosen)


def imbalanced(data: DataList, kept: int) -> DataList:
    """The data list with the training images of `kept_indices`; validation and test images stay."""
    return dataclasses.replace(data, training=[data.training[i] for i in kept_indices(data, kept)])


def _stratified(own: list[int], data: DataList, name: str, kept: int) -> list[int]:
    if len(own) <= kept:
        return own
    classes: dict[int | None, list[int]] = {}
    for i in own:
        label = data.training[i]["label"]
        classes.setdefault(int(label) if isinstance(label, (int, np.integer)) else None, []).append(i)
    exact = {label: kept * len(members) / len(own) for label, members in classes.items()}
    counts = {label: max(1, int(share)) for label, share in exact.items()}
    for label in sorted(exact, key=lambda label: counts[label] - exact[label]):  # the largest remainders first
        if sum(counts.values()) < kept:
            counts[label] += 1
    rng = np.random.default_rng([_SEED, 13, data.tasks[name].index])
    order = sorted(classes.items(), key=lambda pair: -1 if pair[0] is None else pair[0])
    return [int(i) for label, members in order for i in rng.permutation(members)[: counts[label]]]
