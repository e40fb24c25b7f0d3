"""One training of a study: the shipped trainer, the schedule, the average of the weights, the choice of the epoch."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.inferers import Inferer, SimpleInferer, SlidingWindowInferer
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from lorkd_monai.data import DataList
from lorkd_monai.data.samplers import TaskSampler
from lorkd_monai.engines import DecompositionTrainer, TaskEvaluator, make_objective, test_loader, train_loader
from lorkd_monai.engines.schedule import cosine_schedule
from lorkd_monai.handlers import TaskMetric, WeightAverage
from lorkd_monai.networks import LoRKDNet
from lorkd_monai.study.factorization import FactorLoss, FactorNet
from lorkd_monai.study.settings import StudySettings
from lorkd_monai.study.subsets import LabelShareSampler, Part
from lorkd_monai.tasks import image_sides
from lorkd_monai.teachers.teacher import Teacher
from lorkd_monai.transforms import BatchAugment

__all__ = ["Fitted", "evaluation_loader", "fit", "inferer_of"]


@dataclass
class Fitted:
    """A network with the weights of the chosen epoch, and how it was trained.

    ``curves`` holds ``training`` and ``validation``: a row for each epoch, with its number and the terms or scores.
    """

    network: nn.Module
    epoch: int
    score: float
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    images: int = 0

    def facts(self) -> dict[str, Any]:
        """What a run's file keeps, without the curves."""
        spent = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "images": self.images}
        return {"epoch": self.epoch, "validation": self.score, **spent}


def inferer_of(data: DataList, settings: StudySettings) -> Inferer:
    """One pass, or overlapping windows for 3D segmentation."""
    if (data.kind, data.spatial_dims) != ("segmentation", 3):
        return SimpleInferer()
    roi = image_sides(settings.image_size, 3)
    return SlidingWindowInferer(roi_size=roi, sw_batch_size=4, overlap=0.5, mode="gaussian")


def evaluation_loader(dataset: Dataset, data: DataList) -> DataLoader:
    """Batches for evaluation; volumes to segment have different sizes."""
    return test_loader(dataset, 1 if (data.kind, data.spatial_dims) == ("segmentation", 3) else 64)


def fit(
    network: nn.Module,
    training: Part,
    validation: Part,
    settings: StudySettings,
    seed: int,
    teacher: Teacher | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Fitted:
    """Train a network on the device that it is on, and give it the weights of the chosen epoch.

    Args:
        network: takes (image, task); trained in place.
        training: the images to train on.
        validation: those that choose the epoch.
        settings: the budget, optimiser, transfer, augmentation, selection.
        seed: of the draws and the augmentation.
        teacher: for the transfer.
        progress: gets one line for each validation.
    """
    device, data = next(network.parameters()).device, training.data
    options = {"seed": seed, "num_samples": settings.images_per_epoch or len(training)}
    sampling = (settings.sampling, settings.sampling_temperature)
    if all(training.labelled):
        sampler = TaskSampler(training.task_of_item, *sampling, **options)
    else:
        sampler = LabelShareSampler(
            training, settings.label_share, strategy=sampling[0], temperature=sampling[1], **options
        )
    loader = train_loader(training, sampler, settings.batch_size, tasks_per_batch=settings.tasks_per_batch)
    weight = settings.transfer_weight if teacher else 0.0
    if isinstance(network, FactorNet):
        objective = FactorLoss(network, teacher, data, training[0]["image"][None].to(device), settings)
    else:
        objective = make_objective(
            network, teacher, data, training, weight, settings.temperature, settings.transfer_positions
        )
    optimizer = AdamW(_groups(network, objective, settings), lr=settings.learning_rate)
    schedule = _schedule(optimizer, settings.epochs, settings.expert_warmup)
    trainer = DecompositionTrainer(
        device, settings.epochs, loader, network, optimizer, objective, teacher,
        augment=BatchAugment(
            data.spatial_dims, settings.rotate, flip_axes=settings.flip_axes, noise=settings.noise, seed=seed
        ),
        seed=seed, amp=settings.amp,
    )  # fmt: skip
    average = WeightAverage(network, settings.ema)
    average.attach(trainer)
    watch = _Watch(average.network, validation, settings, device, progress)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, watch)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: schedule.step())
    started, cpu = time.perf_counter(), time.process_time()
    trainer.run()
    network.load_state_dict(watch.best)
    return Fitted(
        network.eval(), watch.epoch, watch.score, watch.curves, time.perf_counter() - started - watch.seconds,
        time.process_time() - cpu - watch.cpu_seconds, settings.epochs * len(loader) * loader.batch_sampler.batch_size,
    )  # fmt: skip


def _groups(network: nn.Module, objective: nn.Module, settings: StudySettings) -> list[dict[str, Any]]:
    """Parameter groups: the low-rank factors may have a decay and a learning rate of their own."""
    factors = list(getattr(network, "factors", []))  # of an adapter
    if isinstance(network, LoRKDNet):
        factors += [p for layer in network.expert_layers.values() for p in (*layer.lora_A, *layer.lora_B)]
    own = {id(p) for p in factors}
    rest = [p for p in (*network.parameters(), *objective.parameters()) if id(p) not in own]
    decay = settings.weight_decay
    groups = [{"params": rest, "weight_decay": decay}]
    if factors:
        expert_decay = decay if settings.expert_weight_decay is None else settings.expert_weight_decay
        rate = settings.learning_rate * settings.expert_learning_rate
        groups.append({"params": factors, "weight_decay": expert_decay, "lr": rate, "factors": True})
    return groups


def _schedule(optimizer: AdamW, epochs: int, expert_warmup: int) -> LambdaLR:
    """The bundles' schedule; factors wait for ``expert_warmup`` epochs."""
    schedule = cosine_schedule(optimizer, epochs)
    shape = schedule.lr_lambdas[0]
    if expert_warmup and len(optimizer.param_groups) > 1:
        late = [shape, lambda epoch: 0.0 if epoch < expert_warmup else shape(epoch)]
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"]
        return LambdaLR(optimizer, late)
    return schedule


class _Watch:
    """Validates after an epoch, and keeps the weights of the epoch to choose."""

    def __init__(
        self,
        network: nn.Module,
        validation: Part,
        settings: StudySettings,
        device: str | torch.device,
        progress: Callable[[str], None],
    ) -> None:
        self.network, self.settings, self.progress = network, settings, progress
        self.epoch, self.score, self.best = 0, float("-inf"), {}
        self.curves: dict[str, list[dict[str, float]]] = {"training": [], "validation": []}
        self.seconds = self.cpu_seconds = 0.0
        self.evaluator = None
        if len(validation):
            data = validation.data
            self.evaluator = TaskEvaluator(
                device, evaluation_loader(validation, data), network, inferer=inferer_of(data, settings),
                key_val_metric={"mean": TaskMetric(data.num_classes, data.kind, data.scored)},
            )  # fmt: skip

    def __call__(self, engine: Engine) -> None:
        epoch = engine.state.epoch
        terms = {k: round(v, 6) for k, v in engine.state.metrics.items() if isinstance(v, float)}
        self.curves["training"].append({"epoch": epoch, **terms})
        last = epoch == self.settings.epochs
        if self.evaluator is not None and (epoch % self.settings.val_interval == 0 or last):
            self._look(epoch, last)
        elif last:
            self._keep(epoch, float("nan"))

    def _look(self, epoch: int, last: bool) -> None:
        started, cpu = time.perf_counter(), time.process_time()
        training = self.network.training
        self.evaluator.run()
        self.network.train(training)
        scores = {k: float(v) for k, v in self.evaluator.state.metrics.items()}
        self.curves["validation"].append({"epoch": epoch, **scores})
        self.progress(f"epoch {epoch}/{self.settings.epochs}: validation {scores['mean']:.3f}")
        if last if self.settings.selection == "last" else scores["mean"] > self.score:
            self._keep(epoch, scores["mean"])
        self.seconds += time.perf_counter() - started
        self.cpu_seconds += time.process_time() - cpu

    def _keep(self, epoch: int, score: float) -> None:
        self.epoch, self.score = epoch, score
        self.best = copy.deepcopy(self.network.state_dict())
