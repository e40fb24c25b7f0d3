"""The decomposition trainer: MONAI's supervised trainer, with a task for each sample and a frozen teacher."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.inferers import Inferer, SimpleInferer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lorkd_monai.engines.distributed import average_gradients, share_buffers
from lorkd_monai.errors import LoRKDError, find_lorkd_error
from lorkd_monai.losses import LoRKDLoss
from lorkd_monai.teachers.intensity import TeacherView
from lorkd_monai.transforms import augment_together, fixed_view

__all__ = ["AutocastInferer", "DecompositionTrainer", "TaskEvaluator"]


class _NotLogged(logging.Filter):
    """Keeps what the user is told at the end anyway out of the log.

    On the way of an error through an engine ignite logs it twice and MONAI's `StatsHandler` once with its traceback.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Return False for an error that is logged while a `LoRKDError` is on its way."""
        return record.levelno < logging.ERROR or find_lorkd_error(sys.exc_info()[1]) is None


_NOT_LOGGED = _NotLogged()


def _log_errors_once(engine: Engine) -> None:
    for logger in (engine.logger, logging.getLogger("monai.handlers.StatsHandler")):
        logger.addFilter(_NOT_LOGGED)


class AutocastInferer(Inferer):
    """Run another inferer under autocast on any device; MONAI's engines only know CUDA.

    Args:
        inferer: what runs the network.
        device_type: ``"cpu"`` or ``"cuda"``.
        dtype: bfloat16 on the CPU.
    """

    def __init__(self, inferer: Inferer, device_type: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.inferer, self.device_type, self.dtype = inferer, device_type, dtype

    def __call__(self, inputs: Tensor, network: nn.Module, *args: object, **kwargs: object) -> Tensor:
        """Run the network."""
        with torch.autocast(self.device_type, dtype=self.dtype):
            return self.inferer(inputs, network, *args, **kwargs)


def show_volumes(loader: DataLoader | Iterable, view: TeacherView) -> None:
    """Let a loader's batches hold what a teacher sees of each volume as ``seen``.

    Raises:
        LoRKDError: its data set can't.
    """
    dataset: Any = getattr(loader, "dataset", None)
    if not hasattr(dataset, "show_to"):
        raise LoRKDError(
            "this teacher wants the values of the volumes' files: train it with a TaskDataset, or load it without "
            "from_files"
        )
    dataset.show_to(view.of_values)


def move_batch(batch: dict[str, Tensor], device: torch.device, non_blocking: bool = False) -> dict[str, Tensor]:
    """The tensors of a batch on the device; everything else as it is."""
    return {k: v.to(device, non_blocking=non_blocking) if isinstance(v, Tensor) else v for k, v in batch.items()}


class _StepOutput(list):
    """A step's output as MONAI's handlers read it, a list of one dict, that answers by name as well."""

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(0)[key] if isinstance(key, str) else super().__getitem__(key)


class DecompositionTrainer(SupervisedTrainer):
    """Train a decomposed network on batches of mixed tasks, with the knowledge of a frozen teacher.

    Batches are dicts with ``image``, ``label`` and ``task`` (see `TaskDataset`); with ``seen`` where a teacher from
    elsewhere wants other values of volumes than the student. Each step augments the batch, asks the
    teacher about the very images that the network sees, and minimises the objective. The objective's terms are in
    ``engine.state.output["terms"]`` after each step and, as means over the epoch, in ``engine.state.metrics``.

    All that is random in an epoch is a function of ``seed`` and the epoch's number (the sampler's draws, the
    augmentation, torch's own generators), so a resumed run goes on as the interrupted one would have.

    Args:
        device: where to train.
        max_epochs: number of epochs.
        train_data_loader: gives the batches; its sampler may have ``set_epoch``.
        network: takes (image, task), a :class:`~lorkd_monai.networks.LoRKDNet` or alike.
        optimizer: over the network's parameters and those of ``loss_function``.
        loss_function: the objective.
        teacher: takes (image, task) and gives logits as the network does; None trains without one (the objective then
            needs ``transfer_weight=0``). It is moved to the device. A `CachedTeacher` shows each image in its fixed
            ``views``, one after the other from epoch to epoch.
        augment: ``augment(image, mask or None, iteration)``, see `BatchAugment`.
        seed: see above.
        amp: mixed precision: float16 with loss scaling on CUDA, bfloat16 on the CPU.
        kwargs: passed to MONAI's `SupervisedTrainer`: ``train_handlers``, ``inferer``, ``accumulation_steps``,
            ``compile``, ….

    Raises:
        LoRKDError: during training: a loss that is not finite, a label that does not fit.
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: DataLoader | Iterable,
        network: nn.Module,
        optimizer: Optimizer,
        loss_function: LoRKDLoss,
        teacher: nn.Module | None = None,
        augment: Callable | None = None,
        seed: int = 0,
        amp: bool = False,
        train_handlers: Sequence | None = None,
        inferer: Inferer | None = None,
        **kwargs: object,
    ) -> None:
        device = torch.device(device)
        if amp and device.type == "cpu":
            amp, inferer = False, AutocastInferer(inferer or SimpleInferer(), "cpu")
        self.objective = loss_function.to(device)
        self.teacher: Any = None if teacher is None else teacher.to(device)
        self.augment = augment
        self.seed = seed
        self._views: int | None = getattr(teacher, "views", None)
        view = getattr(teacher, "intensity", None)
        if view is not None and view.from_files:
            show_volumes(train_data_loader, view)
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            network=network,
            optimizer=optimizer,
            loss_function=self._loss,
            prepare_batch=self._prepare,
            inferer=inferer,
            amp=amp,
            decollate=False,
            optim_set_to_none=True,
            **kwargs,
        )
        _log_errors_once(self)
        self._step: dict[str, Tensor | None] = {}
        self._sums: dict[str, tuple[float, int]] = {}
        # Ahead of the given handlers: they read what these leave.
        self.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        self.add_event_handler(IterationEvents.LOSS_COMPLETED, self._keep_terms)
        self.add_event_handler(Events.EPOCH_COMPLETED, self._average_terms)
        if idist.get_world_size() > 1:
            self.add_event_handler(IterationEvents.BACKWARD_COMPLETED, average_gradients, self.objective)
            self.add_event_handler(Events.EPOCH_COMPLETED, share_buffers, self.network)
        self._register_handlers(train_handlers or [])

    def _start_epoch(self, engine: Engine) -> None:
        epoch = self.state.epoch - 1
        for sampler in (self.data_loader.sampler, self.data_loader.batch_sampler):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            drawing = getattr(sampler, "sampler", sampler)
            if hasattr(drawing, "views"):
                drawing.views = self._views
        state = np.random.SeedSequence([self.seed, epoch, self.state.rank]).generate_state(3)
        torch.manual_seed(int(state[0]))
        np.random.seed(int(state[1]))
        random.seed(int(state[2]))
        self._sums = {}
        self.objective.train()

    def _prepare(
        self, batch: dict[str, Tensor], device: torch.device, non_blocking: bool, **kwargs: object
    ) -> tuple[Tensor, Tensor, tuple, dict]:
        batch = move_batch(batch, device, non_blocking)
        image, label, task = batch["image"], batch["label"], batch["task"]
        seen, channels = batch.get("seen"), image.shape[1]
        image = image if seen is None else torch.cat([image, seen], 1)
        if self.augment is not None:
            augment = self.augment if seen is None else augment_together(self.augment, channels)
            is_mask = label.ndim == image.ndim
            iteration = self.state.iteration * idist.get_world_size() + self.state.rank
            if self._views is None:
                image, mask = augment(image, label if is_mask else None, iteration)
            else:
                view = (self.state.epoch - 1) % self._views
                image, mask = fixed_view(augment, image, label if is_mask else None, view)
            label = mask if is_mask else label
        asked, shown = image, {}
        if seen is not None:
            image, asked, shown = image[:, :channels], image[:, channels:], {"shown": True}
        teacher_out = teacher_features = has_teacher = None
        extra = {}
        if self.teacher is not None and self.objective.transfer_weight > 0:
            with torch.no_grad(), torch.autocast(device.type, enabled=bool(self.amp)):
                if self.objective.feature_transfer is not None:
                    teacher_out, teacher_features = self.teacher(asked, task, return_features=True, **shown)
                    extra = {"return_features": True}
                else:
                    teacher_out = self.teacher(asked, task, **shown)
            has_teacher = self.teacher.has_logits(task)
        self._step = {
            "task": task,
            "teacher_out": teacher_out,
            "teacher_features": teacher_features,
            "has_teacher": has_teacher,
        }
        return image, label, (task,), extra

    def _iteration(self, engine: Engine, batchdata: dict[str, Tensor]) -> _StepOutput:
        return _StepOutput([super()._iteration(engine, batchdata)])

    def _loss(self, pred: Tensor | tuple[Tensor, Tensor], label: Tensor) -> Tensor:
        features = None
        if self._step["teacher_features"] is not None:
            pred, features = pred
        return self.objective(
            pred,
            label,
            self._step["task"],
            self._step["teacher_out"],
            student_features=features,
            teacher_features=self._step["teacher_features"],
            has_teacher=self._step["has_teacher"],
        )

    def _keep_terms(self, engine: Engine) -> None:
        terms = dict(self.objective.terms)
        self.state.output["terms"] = terms
        for name, value in terms.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value, count + 1)

    def _average_terms(self, engine: Engine) -> None:
        self.state.metrics.update({name: total / count for name, (total, count) in self._sums.items()})


class TaskEvaluator(SupervisedEvaluator):
    """Run a network that takes a task over a data set, one batch after the other.

    Leaves ``image``, ``label``, ``task`` and ``pred`` (logits) in ``engine.state.output``.

    Args:
        device: where to run.
        val_data_loader: gives batches as `TaskDataset` does.
        network: takes (image, task); a teacher where the batches hold what it sees, as ``seen``.
        kwargs: passed to MONAI's `SupervisedEvaluator`: ``inferer``, ``key_val_metric``, ``val_handlers``, ….
    """

    def __init__(
        self, device: torch.device | str, val_data_loader: DataLoader | Iterable, network: nn.Module, **kwargs: object
    ) -> None:
        super().__init__(
            device=torch.device(device),
            val_data_loader=val_data_loader,
            network=network,
            prepare_batch=self._prepare,
            decollate=False,
            **kwargs,
        )
        _log_errors_once(self)
        self.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._keep_batch)

    def _prepare(
        self, batch: dict[str, Tensor], device: torch.device, non_blocking: bool, **kwargs: object
    ) -> tuple[Tensor, Tensor, tuple, dict]:
        self._batch = move_batch(batch, device, non_blocking)
        if "seen" in self._batch:
            return self._batch["seen"], self._batch["label"], (self._batch["task"],), {"shown": True}
        return self._batch["image"], self._batch["label"], (self._batch["task"],), {}

    def _keep_batch(self, engine: Engine) -> None:
        self.state.output["task"] = self._batch["task"]
        if "spacing" in self._batch:
            self.state.output["spacing"] = self._batch["spacing"]
