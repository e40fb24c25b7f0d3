"""The students of one run: built as the method says, trained within the budget, joined to one network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorkd_monai.data import DataList, TaskDataset
from lorkd_monai.data.samplers import draws_per_task
from lorkd_monai.experts.weight_selection import select_weights
from lorkd_monai.networks import LoRKDNet, TaskChannels
from lorkd_monai.study.diagnostics import gradient_conflict, spectra
from lorkd_monai.study.factorization import FactorNet, build_factors
from lorkd_monai.study.methods import Method
from lorkd_monai.study.models import OneEach, build_student, members_of
from lorkd_monai.study.peft_rival import adapt, adapter_facts, share_frozen
from lorkd_monai.study.settings import StudySettings
from lorkd_monai.study.subsets import Part
from lorkd_monai.study.training import Fitted, fit
from lorkd_monai.teachers.cache import RememberedTeacher
from lorkd_monai.teachers.teacher import Teacher

__all__ = ["Students", "Trained", "draws_of"]

Trained = tuple[nn.Module, dict[str, Fitted], dict[str, Any]]
"""The trained network, how each of its parts was trained, and what else was found out."""


def draws_of(data: DataList, settings: StudySettings, names: list[str]) -> int:
    """Draws of an epoch: what these tasks get of the draws of all, however few of the images have labels."""
    counts = {name: row["training"] for name, row in data.counts().items()}
    temperature = {"natural": 1.0, "balanced": float("inf")}.get(settings.sampling, settings.sampling_temperature)
    total = settings.images_per_epoch or sum(counts.values())
    draws = dict(zip(counts, draws_per_task(list(counts.values()), total, temperature), strict=True))
    return max(1, sum(draws[name] for name in names))


@dataclass(frozen=True)
class Students:
    """The students of one run.

    Args:
        method: says what they are.
        settings: of this method.
        training, validation: images of all tasks.
        labelled: which training images have labels.
        seed: of the weights, the draws, the augmentation.
        view: the foundation model, where the method starts from its weights.
        teacher: gives the frozen teacher of some tasks.
        device: where to train.
        progress: is told one line now and then.
    """

    method: Method
    settings: StudySettings
    training: TaskDataset
    validation: TaskDataset
    labelled: list[bool]
    seed: int
    view: TaskChannels | Teacher | None
    teacher: Callable[[list[str]], RememberedTeacher]
    device: torch.device
    progress: Callable[[str], None]

    @property
    def data(self) -> DataList:
        """The data list."""
        return self.training.data

    def train(self) -> Trained:
        """Train them all."""
        names = list(self.data.tasks)
        if self.method.family == "stl":
            fitted = {
                name: self._fit(self._student([name]), [name], self.settings.epochs, single=True) for name in names
            }
            return self._joined(fitted), fitted, {}
        if self.method.family in ("separate", "peft"):
            return self._train_separate(names)
        if self.method.family == "kf":
            start = members_of(self.view)[0] if self.settings.init == "teacher" else None
            factors = build_factors(self.settings, self.data, self.seed, start)
            return factors, {"all tasks": self._fit(factors, names, self.settings.epochs)}, {}
        experts = self.method.family == "lorkd"
        network = self._student(names, experts)
        fitted = self._fit(network, names, self.settings.epochs)
        part = Part(self.training, names, self.labelled)
        notes: dict[str, Any] = {"gradient_conflict": gradient_conflict(network, self.data, part, seed=self.seed)}
        if experts:
            notes |= {"spectra": spectra(network), "ranks": network.spec()["rank"]}
        return network, {"all tasks": fitted}, notes

    def _train_separate(self, names: list[str]) -> Trained:
        first = self.settings.epochs // 2
        shared = self._student(names)
        fitted = {"all tasks": self._fit(shared, names, max(1, first))}
        adapted = self.method.family == "peft"
        copies: dict[str, LoRKDNet] = {}
        for name in names:
            plain, classes = shared.extract(name), self.data.tasks[name].num_classes
            copies[name] = (
                adapt(plain, name, classes, self.settings, self.seed)
                if adapted
                else LoRKDNet(plain, {name: classes}, rank=0)
            )
        own = {
            name: self._fit(network, [name], max(1, self.settings.epochs - first), single=True)
            for name, network in copies.items()
        }
        notes: dict[str, Any] = {}
        if adapted:
            share_frozen([one.network for one in own.values()])
            notes["adapters"] = {name: adapter_facts(one.network) for name, one in own.items()}
        return self._joined(own), fitted | own, notes

    def _joined(self, fitted: dict[str, Fitted]) -> OneEach:
        return OneEach({name: one.network for name, one in fitted.items()}, self.data.num_classes).eval()

    def _student(self, names: list[str], experts: bool = False) -> LoRKDNet:
        network = build_student(self.settings, self.data.only(*names), experts, self.seed)
        if self.settings.init == "teacher":
            select_weights(network, members_of(self.view)[0])
        return network

    def _fit(self, network: LoRKDNet | FactorNet, names: list[str], epochs: int, single: bool = False) -> Fitted:
        own: dict[str, Any] = {"epochs": epochs, "images_per_epoch": draws_of(self.data, self.settings, names)}
        if single:
            own |= {"batch_size": self.settings.images_of_one_task, "tasks_per_batch": None}
        part = Part(self.training, names, self.labelled, drop_unlabelled=not self.method.distilled)
        return fit(
            network.to(self.device), part, Part(self.validation, names), self.settings.changed(own), self.seed,
            self.teacher(names) if self.method.distilled else None,
            lambda line: self.progress(f"{', '.join(names)}: {line}" if single else line),
        )  # fmt: skip
