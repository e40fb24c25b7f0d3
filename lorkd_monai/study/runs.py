"""One run of a study: build the method's networks, train them, measure them on the test images."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch
from torch import nn

from lorkd_monai.checkpoints.weights import load_weights, save_weights
from lorkd_monai.data import DataList, TaskDataset
from lorkd_monai.engines.evaluation import collect_predictions, figures_of_predictions
from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks import TaskChannels
from lorkd_monai.study import measures
from lorkd_monai.study.examples import example_arrays
from lorkd_monai.study.files import RunFile
from lorkd_monai.study.imbalance import imbalanced, kept_indices, small_tasks
from lorkd_monai.study.methods import Method, kept_images_of, label_share_of, teacher_setting_of
from lorkd_monai.study.models import members_of, teacher_of, teacher_view
from lorkd_monai.study.patients import clusters_of, patient_numbers
from lorkd_monai.study.settings import StudySettings
from lorkd_monai.study.students import Students, Trained
from lorkd_monai.study.subsets import Part, choose_labelled
from lorkd_monai.study.training import evaluation_loader, fit, inferer_of
from lorkd_monai.tasks import image_sides, score_of
from lorkd_monai.teachers.cache import RememberedTeacher
from lorkd_monai.teachers.find import find_teacher
from lorkd_monai.teachers.teacher import Teacher

__all__ = ["Workbench", "check_teacher"]

_TEACHER_MEMORY = 2**29  # bytes of answers of each set of tasks


def check_teacher(file: RunFile) -> None:
    """Refuse a teacher that is not trained, or whose weights are gone.

    Raises:
        LoRKDError: it is one of these.
    """
    if not file.done:
        raise LoRKDError(f"seed {file.seed} has no teacher yet: put 'teacher' among the methods")
    if not file.weights.is_file():
        raise LoRKDError(f"{file.weights} is missing: delete {file.json} to train this teacher again")


class Workbench:
    """The images of a study in memory; it does runs and writes their files.

    Args:
        folder: of the study.
        data: the data list, with training, validation and test images.
        settings: what all runs have in common.
        device: where to train.
        keep_weights: keep the weights of every run, not of the teachers alone.
        progress: is told one line now and then.
    """

    def __init__(
        self,
        folder: str,
        data: DataList,
        settings: StudySettings,
        device: str | torch.device = "cpu",
        keep_weights: bool = False,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.folder, self.data, self.settings, self.device = folder, data, settings, torch.device(device)
        self.keep_weights, self.progress = keep_weights, progress
        volumes = (data.kind, data.spatial_dims) == ("segmentation", 3)
        size = list(settings.image_size) if isinstance(settings.image_size, tuple) else settings.image_size
        patch = {"patch_size": size} if volumes else {}
        self.training = TaskDataset(data, "training", settings.in_channels, size, **patch)
        self.validation = TaskDataset(data, "validation", settings.in_channels, size)
        self.test = TaskDataset(data, "test", settings.in_channels, size)
        self.teacher_setting, self.facts = "full", {}
        self._imbalanced: dict[str, Workbench] = {}
        self._foundation: tuple[int, TaskChannels | Teacher] | None = None
        self._teachers: dict[tuple[str, ...], RememberedTeacher] = {}

    def run(self, method: Method, setting: str, seed: int) -> None:
        """Do one run and write its files.

        Raises:
            LoRKDError: a method that changes what all runs must share, or a distilled one whose teacher is missing.
        """
        if teacher_setting_of(setting) != self.teacher_setting:
            self._of_setting(setting).run(method, setting, seed)
            return
        settings = method.settings(self.settings)
        if method.family == "teacher":
            bundle = settings.teacher_bundle is not None
            self.record(
                method, setting, seed,
                lambda labelled: (self.foundation(seed), {}, {}) if bundle else self._train_teacher(settings, seed),
            )  # fmt: skip
            return
        view = self.foundation(seed) if method.distilled or settings.init == "teacher" else None

        def train(labelled: list[bool]) -> Trained:
            students = Students(
                method, settings, self.training, self.validation, labelled, seed, view,
                lambda names: self._teacher_of(seed, names), self.device, self.progress,
            )  # fmt: skip
            return students.train()

        self.record(method, setting, seed, train)

    def _of_setting(self, setting: str) -> Workbench:
        """A bench with the training images of a setting of unequal tasks, and the teacher that has seen these."""
        if setting not in self._imbalanced:
            bench, kept = copy.copy(self), kept_images_of(setting)
            bench.data = imbalanced(self.data, kept)
            bench.training = self.training.only(bench.data, kept_indices(self.data, kept))
            bench.teacher_setting, bench._foundation, bench._teachers = setting, None, {}
            bench.facts = {"imbalance": {"kept_images": kept, "small_tasks": small_tasks(list(self.data.tasks))}}
            self._imbalanced[setting] = bench
        self._imbalanced[setting].progress = self.progress
        return self._imbalanced[setting]

    def record(self, method: Method, setting: str, seed: int, train: Callable[[list[bool]], Trained]) -> None:
        """Train as told, measure on the test images, and write the files of the run.

        Args:
            method, setting, seed: which run it is.
            train: gets which training images have labels.
        """
        settings = method.settings(self.settings)
        file = RunFile(self.folder, setting, method.name, seed)
        labelled = choose_labelled(self.data.training, label_share_of(setting), seed)
        started = datetime.now(timezone.utc)
        with measures.peak_memory(self.device) as memory:
            network, fitted, notes = train(labelled)
        clock = time.perf_counter()
        inferer = inferer_of(self.data, settings)
        predictions = collect_predictions(
            network, evaluation_loader(self.test, self.data), self.data, self.device, inferer
        )
        patients = patient_numbers(self.data)
        figures = figures_of_predictions(predictions, self.data, settings.resamples, clusters_of(patients))
        evaluation = time.perf_counter() - clock
        arrays = {
            f"{self.data.tasks[name].index}_{key}": value.numpy()
            for name, kept in predictions.items()
            for key, value in kept.items()
        }
        if self.data.kind == "segmentation":
            arrays |= example_arrays(network, self.test, predictions, self.device, inferer)
        self._save_weights(file, method, network)
        score = score_of(self.data.kind)
        values = [figures[t][score]["value"] for t in self.data.scored if score in figures.get(t, {})]
        content = {
            "method": method.name,
            "family": method.family,
            "about": method.about,
            "distilled": method.distilled,
            "setting": setting,
            "seed": seed,
            "score": score,
            "mean": float(np.mean(values)) if values else None,
            "figures": figures,
            "labelled_images": self._labelled_counts(None if method.family == "teacher" else labelled),
            "fits": {name: one.facts() for name, one in fitted.items()},
            "curves": {name: one.curves for name, one in fitted.items()},
            "cost": measures.cost_of(network.cpu(), list(self.data.tasks), self._input_shape()),
            "time": {
                "training_s": sum(one.seconds for one in fitted.values()),
                "training_cpu_s": sum(one.cpu_seconds for one in fitted.values()),
                "evaluation_s": evaluation,
            },
            "memory": memory,
            "settings": settings.as_data(),
            **notes,
            **self.facts,
            **({"patients": patients} if patients else {}),
            "data": self._data_facts(),
            "command": measures.command(),
            "versions": measures.versions(),
            "hardware": measures.hardware(self.device),
            "started": started.isoformat(timespec="seconds"),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        file.write(content, arrays)

    def _input_shape(self) -> tuple[int, ...]:
        """Of one image, or of one patch of a volume."""
        return (self.settings.in_channels, *image_sides(self.settings.image_size, self.data.spatial_dims))

    def _save_weights(self, file: RunFile, method: Method, network: nn.Module) -> None:
        if method.family == "teacher" and isinstance(network, Teacher):
            return
        if method.family == "teacher":
            states = [m.state_dict() for m in members_of(network)]
            state = {f"{i}.{k}": v for i, s in enumerate(states) for k, v in s.items()}
        elif self.keep_weights:
            state = network.state_dict()
        else:
            return
        file.weights.parent.mkdir(parents=True, exist_ok=True)
        save_weights(file.weights, state)

    def foundation(self, seed: int) -> TaskChannels | Teacher:
        """The foundation model of a seed, from the files of its run; or the bundle that is named in the settings.

        Raises:
            LoRKDError: it has not been trained yet, or the bundle does not fit.
        """
        if self.settings.teacher_bundle is not None:
            if self._foundation is None:
                self._foundation = (seed, find_teacher(self.settings.teacher_bundle, self.data))
            return self._foundation[1]
        if self._foundation is None or self._foundation[0] != seed:
            file = RunFile(self.folder, self.teacher_setting, "teacher", seed)
            check_teacher(file)
            state = load_weights(file.weights)
            count = 1 + max(int(key.split(".", 1)[0]) for key in state)
            states = [{k.split(".", 1)[1]: v for k, v in state.items() if k.startswith(f"{i}.")} for i in range(count)]
            view = teacher_view(self.settings, self.data, [{f"network.{k}": v for k, v in s.items()} for s in states])
            self._foundation = (seed, view.eval())
            self._teachers = {}
        return self._foundation[1]

    def _teacher_of(self, seed: int, names: list[str]) -> RememberedTeacher:
        view, key = self.foundation(seed), tuple(names)
        if key not in self._teachers:
            if isinstance(view, Teacher):
                teacher = find_teacher(self.settings.teacher_bundle, self.data.only(*names))
            else:
                teacher = teacher_of(view, names)
            self._teachers[key] = RememberedTeacher(teacher, _TEACHER_MEMORY)
        return self._teachers[key]

    def _train_teacher(self, settings: StudySettings, seed: int) -> Trained:
        names = list(self.data.tasks)
        part, validation = Part(self.training, names, drop_unlabelled=True), Part(self.validation, names)
        budget = settings.changed(
            {
                "selection": settings.teacher_selection,
                "epochs": settings.teacher_epochs,
                "images_per_epoch": settings.teacher_images_per_epoch or settings.images_per_epoch,
                "ema": settings.teacher_ema,
            }
        )
        fitted = {}
        for member in range(settings.teacher_members):
            own = seed * 1000 + member
            torch.manual_seed(own)
            network = TaskChannels.build(settings.teacher_backbone, self.data.num_classes).to(self.device)
            fitted[f"member {member}"] = fit(network, part, validation, budget, own, progress=self.progress)
        states = [one.network.state_dict() for one in fitted.values()]
        return teacher_view(settings, self.data, states).to(self.device), fitted, {}

    def _labelled_counts(self, labelled: list[bool] | None) -> dict[str, int]:
        counts = dict.fromkeys(self.data.tasks, 0)
        for i, item in enumerate(self.data.training):
            counts[item["task"]] += item["label"] is not None if labelled is None else labelled[i]
        return counts

    def _data_facts(self) -> dict[str, Any]:
        data = self.data
        return {
            "name": data.name,
            "kind": data.kind,
            "spatial_dims": data.spatial_dims,
            "images": data.counts(),
            "tasks": {
                name: {
                    "labels": {str(k): v for k, v in task.labels.items()},
                    "modality": task.modality,
                    "scored": task.score,
                }
                for name, task in data.tasks.items()
            },
        }
