"""The LoRKD objective: the task loss plus the weighted transfer of the teacher's knowledge."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from lorkd_monai.errors import LoRKDError
from lorkd_monai.losses.task import (
    CrossEntropyPerTask,
    PerTaskLoss,
    check_labels,
    dice_ce,
    labelled_samples,
    levels_of,
)
from lorkd_monai.losses.transfer import FeatureTransferLoss, TransferLoss, own_channels, spread

__all__ = ["LoRKDLoss"]

TaskLoss = Callable[[Tensor, Tensor], Tensor]


class LoRKDLoss(nn.Module):
    r"""``total = task + transfer_weight · transfer + feature_weight · feature_transfer``.

    * *task*: the mean loss of the labelled samples of the batch, each on its own channels. A label of -1 (or a label
      map of only -1) marks a sample without label.
    * *transfer*: the divergence from the teacher's logits (see `transfer_loss`), summed over the samples with such
      logits and divided by the batch size; under deep supervision on the full resolution only.
    * *feature_transfer*: the same on pooled features (see `FeatureTransferLoss`), for the samples without logits of
      the teacher.

    Everything is computed in float32, also under autocast; float64 stays. After each call ``loss.terms`` holds the
    unweighted terms as floats: ``total``, ``task``, ``transfer``, ``feature_transfer`` (the last two if they were
    computed), and ``task/<name>``, the mean task loss of each task present.

    Args:
        task_loss: "ce" (classification), "dice_ce" (segmentation, MONAI's `DiceCELoss`), or a callable
            ``(output of one task B_t×n_t×…, label) -> scalar`` that returns the mean over these samples.
        transfer_weight: 0 or more; 0 trains without transfer and needs no teacher.
        temperature: T of the transfer.
        mode: "softmax" or "sigmoid", see `transfer_loss`.
        transfer_positions: "equal" or "by_class", see `transfer_loss`; without spatial dimensions they are the same.
        tasks: {name: number of channels} in the network's order, ``net.num_classes``. Without it tasks are named by
            their number, and a sample's own channels are those that are not -inf.
        feature_transfer: a `FeatureTransferLoss`; its parameters become parameters of this module.
        feature_weight: 0 or more.
        class_weights, label_smoothing: for "ce", see `CrossEntropyPerTask`.
        deep_supervision: weights over resolutions, see `PerTaskLoss`.
        task_loss_options: keyword arguments for MONAI's `DiceCELoss`.

    Raises:
        LoRKDError: in the constructor for an option out of its range; in a call for shapes that do not fit, a label
            outside its task's classes, a missing teacher, or a term that is NaN or infinite.

    Source: the objective of LoRKD (arXiv 2404.17184; arXiv 2409.19540 for segmentation).

    Example:
        >>> loss = LoRKDLoss("ce", tasks={"breast": 2, "blood": 3})
        >>> student = torch.tensor([[1.0, 0.0, -math.inf], [0.0, 1.0, 2.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 0.0, -math.inf], [0.0, 0.0, 4.0]])
        >>> loss(student, torch.tensor([0, 2]), torch.tensor([0, 1]), teacher).backward()
        >>> sorted(loss.terms)
        ['task', 'task/blood', 'task/breast', 'total', 'transfer']
    """

    def __init__(
        self,
        task_loss: str | TaskLoss = "ce",
        transfer_weight: float = 1.0,
        temperature: float = 4.0,
        *,
        mode: str = "softmax",
        transfer_positions: str = "equal",
        tasks: Mapping[str, int] | None = None,
        feature_transfer: FeatureTransferLoss | None = None,
        feature_weight: float = 1.0,
        class_weights: Mapping[str, Sequence[float]] | None = None,
        label_smoothing: float | Mapping[str, float] = 0.0,
        deep_supervision: str | Sequence[float] = "exp",
        task_loss_options: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        for name, weight in (("transfer_weight", transfer_weight), ("feature_weight", feature_weight)):
            if not 0.0 <= float(weight) < math.inf:
                raise LoRKDError(f"{name}: expected a finite number of 0 or more, got {weight!r}")
        self.transfer_weight, self.feature_weight = float(transfer_weight), float(feature_weight)
        self.transfer = TransferLoss(temperature, mode, positions=transfer_positions)
        self.feature_transfer = feature_transfer
        self.tasks = None if tasks is None else dict(tasks)
        self.terms: dict[str, float] = {}
        if task_loss == "ce":
            if task_loss_options:
                raise LoRKDError(
                    "task_loss_options are for task_loss='dice_ce'; 'ce' takes class_weights, label_smoothing"
                )
            self.task_loss: nn.Module = CrossEntropyPerTask(class_weights, label_smoothing)
            if self.tasks is not None:
                self.task_loss.check_tasks(self.tasks)
            elif class_weights or isinstance(label_smoothing, Mapping):
                raise LoRKDError("class_weights and label_smoothing by task need tasks={name: channels}")
        elif class_weights or label_smoothing:
            raise LoRKDError(f"class_weights and label_smoothing are for task_loss='ce', got task_loss={task_loss!r}")
        elif task_loss == "dice_ce":
            self.task_loss = PerTaskLoss(dice_ce(**(task_loss_options or {})), deep_supervision)
        elif callable(task_loss):
            self.task_loss = PerTaskLoss(task_loss, deep_supervision)
        else:
            raise LoRKDError(f"task_loss: expected 'ce', 'dice_ce' or a callable, got {task_loss!r}")

    def forward(
        self,
        student_out: Tensor | list[Tensor] | tuple[Tensor, ...],
        label: Tensor,
        task: Tensor,
        teacher_out: Tensor | None = None,
        student_features: Tensor | None = None,
        teacher_features: Tensor | None = None,
        has_teacher: Tensor | None = None,
    ) -> Tensor:
        """Compute the total.

        Args:
            student_out: B×C or B×C×spatial logits, -inf past each sample's own channels; under deep supervision a
                list of them, or their stack B×K×C×spatial.
            label: B class numbers (or B×1), or label maps B×1×spatial; -1 where there is none.
            task: B task numbers.
            teacher_out: the teacher's logits, of the shape of the (full resolution) output; NaN for a sample that
                the teacher has no head for. May be None if ``transfer_weight`` is 0, if features are given, or in
                eval mode.
            student_features, teacher_features: pooled features B×D for the feature transfer.
            has_teacher: B booleans, see `transfer_loss`.
        """
        label, task = _plain(label), _plain(task)
        outputs = [_plain(o) for o in student_out] if isinstance(student_out, (list, tuple)) else _plain(student_out)
        first = outputs[0] if isinstance(outputs, list) else outputs
        with torch.autocast(first.device.type, enabled=False):
            levels = levels_of(outputs, label.ndim - 2 if label.ndim > 2 else 0)
            label, task = self._check(levels, label, task)
            own, names = self._own_channels(levels[0], task)
            terms = self._task_terms(levels, label, task, own, names)
            total = terms["task"]
            if self.transfer_weight > 0 and teacher_out is not None:
                teacher = _plain(teacher_out)
                if has_teacher is None:
                    has_teacher = ~teacher.isnan().flatten(1).all(1)
                terms["transfer"] = self.transfer(levels[0], teacher, own, has_teacher)
                total = total + self.transfer_weight * terms["transfer"]
            if self.feature_transfer is not None and self.feature_weight > 0 and teacher_features is not None:
                without_logits = None if has_teacher is None else ~_plain(has_teacher).to(task.device)
                if student_features is None:
                    raise LoRKDError("feature transfer: teacher_features came without student_features; pass both")
                terms["feature_transfer"] = self.feature_transfer(
                    _plain(student_features), _plain(teacher_features), without_logits
                )
                total = total + self.feature_weight * terms["feature_transfer"]
            if self.training and self.transfer_weight > 0 and not terms.keys() & {"transfer", "feature_transfer"}:
                raise LoRKDError(
                    f"LoRKDLoss(transfer_weight={self.transfer_weight:g}) got neither teacher_out nor teacher_features "
                    "with a feature_transfer. Pass the teacher's logits, or set transfer_weight=0 to train without it."
                )
            terms["total"] = total
            self._record(terms, task, names)
        return total

    def _check(self, levels: list[Tensor], label: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
        """Labels and tasks as integers of the right shape, or an error."""
        output = levels[0]
        batch = output.shape[0]
        if task.ndim == 0 or (task.shape == (1,) and batch > 1):
            task = task.reshape(1).expand(batch)
        if task.shape != (batch,):
            raise LoRKDError(f"task: expected one task number for each of {batch} samples, got {tuple(task.shape)}")
        task = task.to(output.device, torch.long)
        expected = (batch, 1, *output.shape[2:]) if output.ndim > 2 else (batch,)
        if output.ndim == 2 and label.shape == (batch, 1):
            label = label[:, 0]
        if label.shape != expected:
            raise LoRKDError(
                f"label: expected shape {expected} for an output of shape {tuple(output.shape)}, got "
                f"{tuple(label.shape)}. Class numbers are B, label maps B×1×spatial of the output's size."
            )
        return label.to(output.device, torch.long), task

    def _own_channels(self, output: Tensor, task: Tensor) -> tuple[Tensor, list[str]]:
        """The B×C mask of the samples' own channels, and the names of the tasks by number."""
        if self.tasks is None:
            return own_channels(output), [str(t) for t in range(int(task.max()) + 1)]
        names, counts = list(self.tasks), task.new_tensor(list(self.tasks.values()))
        if int(task.min()) < 0 or int(task.max()) >= len(names):
            raise LoRKDError(
                f"task: expected numbers 0 to {len(names) - 1} for the tasks {names}, got {sorted(set(task.tolist()))}"
            )
        needed = int(counts[task].max())
        if output.shape[1] < needed:
            raise LoRKDError(
                f"student_out has {output.shape[1]} channels, but the tasks in the batch need {needed}: the loss was "
                "made for other tasks than the network. Give it tasks=net.num_classes."
            )
        return torch.arange(output.shape[1], device=task.device) < counts[task].unsqueeze(1), names

    def _task_terms(
        self, levels: list[Tensor], label: Tensor, task: Tensor, own: Tensor, names: list[str]
    ) -> dict[str, Tensor]:
        """``task`` and ``task/<name>`` of the tasks that have a labelled sample in the batch."""
        labelled, channels = labelled_samples(label), own.sum(1)
        classify = isinstance(self.task_loss, CrossEntropyPerTask)
        if classify and levels[0].ndim > 2:
            raise LoRKDError(
                f"task_loss='ce' is for class logits B×C, got an output of shape {tuple(levels[0].shape)}; "
                "segmentation takes task_loss='dice_ce'."
            )
        # In segmentation a task of one channel is a foreground by sigmoid, with the labels 0 and 1.
        check_labels(label, labelled, channels if classify else channels.clamp(min=2), task, names)
        number = int(labelled.sum())
        terms = {"task": levels[0].new_zeros(())}
        if not number:  # a 0 that is still part of the graph
            terms["task"] = 0.0 * levels[0].masked_fill(~spread(own, levels[0]), 0.0).sum()
        per_sample = self.task_loss(levels[0], label, task, own, names) if classify else None
        for t in task[labelled].unique().tolist():
            chosen = (labelled & (task == t)).nonzero()[:, 0]
            if per_sample is not None:
                mean = per_sample[chosen].mean()
            else:
                mean = self.task_loss([level[chosen] for level in levels], label[chosen], int(channels[chosen[0]]))
            terms["task"] = terms["task"] + mean * (len(chosen) / number)
            terms[f"task/{names[t]}"] = mean
        return terms

    def _record(self, terms: dict[str, Tensor], task: Tensor, names: list[str]) -> None:
        """Set ``self.terms``; a term that is not finite is an error that names it and the tasks of the batch."""
        values = torch.stack([value.detach().to(terms["total"].dtype) for value in terms.values()]).tolist()
        self.terms = dict(zip(terms, values))
        bad = [f"{name} = {value}" for name, value in self.terms.items() if not math.isfinite(value)]
        if bad:
            present = ", ".join(names[t] for t in task.unique().tolist())
            raise LoRKDError(
                f"the loss is not finite: {', '.join(bad)}; tasks in the batch: {present}. Lower the learning rate or "
                "clip gradients, try without AMP or with bfloat16, and check the images of these tasks (and the "
                "teacher's output, for a transfer term) for NaN and extreme values."
            )


def _plain(x: Tensor) -> Tensor:
    """The tensor without the metadata that MONAI's MetaTensor carries through every operation."""
    return x.as_tensor() if isinstance(x, MetaTensor) else x
