"""The frozen teacher: a network with the classes of several tasks, and their channels in its output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks.routing.table import task_list
from lorkd_monai.networks.surgery.heads import find_heads, pooled_head_input
from lorkd_monai.networks.surgery.outputs import first_tensor
from lorkd_monai.teachers.intensity import TeacherView

__all__ = ["Channel", "Teacher"]

Channel = int | Sequence[int] | None
"""Where a teacher keeps one class: one of its channels, several that together make the class, or none."""

_ACTIVATIONS = ("softmax", "sigmoid")


class Teacher(nn.Module):
    """A frozen network that gives each sample the logits of its own task.

    It stays in evaluation mode whatever ``train()`` says, and computes without gradients.

    Args:
        network: the teacher's network; it is used, not copied, and its parameters stop requiring gradients.
        channels: task -> the channels of its classes in the network's output, in the order of the task's classes.
            An entry is a channel; or several (the background of a teacher with more classes: its logit is the
            logsumexp over them, so that the softmax over the task's channels gives the sum of their probabilities);
            or None, for a sigmoid teacher that does not know this class. None in place of the list, or no entry for a
            task: the teacher has no logits for it. ``channels=None``: its output's channels are those of every task.
        num_classes: task -> number of classes, in the order of the student's tasks (``LoRKDNet.num_classes``).
        activation: ``"softmax"`` or ``"sigmoid"``: what the teacher's logits go through.
        in_channels: image channels that the network takes; None: those of its first convolution.
        head: name of the last layer, where it can't be found; only needed for features.
        intensity: what is done to the student's images on their way to the network, and to the answer on its way back;
            None: nothing.

    Raises:
        LoRKDError: a channel list of another length than its task's classes, a negative or repeated channel, an
            unknown task or activation.

    Example::

        teacher = Teacher(network, {"spleen": [[0, 2], 1], "heart": None}, {"spleen": 2, "heart": 3})
        logits = teacher(torch.rand(2, 3, 32, 32), torch.tensor([1, 0]))   # 2 × 3 × 32 × 32; the first all NaN
    """

    def __init__(
        self,
        network: nn.Module,
        channels: Mapping[str, Sequence[Channel] | None] | None,
        num_classes: Mapping[str, int],
        activation: str = "softmax",
        in_channels: int | None = None,
        head: str | None = None,
        intensity: TeacherView | None = None,
    ) -> None:
        super().__init__()
        self.intensity = intensity
        if activation not in _ACTIVATIONS:
            raise LoRKDError(f"activation must be one of {_ACTIVATIONS}, got {activation!r}")
        self.num_classes = dict(num_classes)
        if not self.num_classes:
            raise LoRKDError("num_classes must map each task to its number of classes, got none")
        if channels is None:
            channels = {name: list(range(n)) for name, n in self.num_classes.items()}
        unknown = [t for t in channels if t not in self.num_classes]
        if unknown:
            raise LoRKDError(f"channels: unknown task {unknown[0]!r}; the tasks are {', '.join(self.num_classes)}")
        self.channels = {
            name: None if (own := channels.get(name)) is None else _checked(name, own, n, activation)
            for name, n in self.num_classes.items()
        }
        self.activation = activation
        self.network = network.requires_grad_(False)
        self.in_channels = channels_of(network) if in_channels is None else in_channels
        try:
            heads = find_heads(network, head)
        except LoRKDError:
            if head is not None:
                raise
            heads = []  # only features need it
        for module in (network.get_submodule(name) for name in heads):
            if _note_head_input not in module._forward_pre_hooks.values():  # another Teacher on the same network has it
                module.register_forward_pre_hook(_note_head_input)
        self._known = [c is not None for c in self.channels.values()]
        self.eval()

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the student's order."""
        return list(self.num_classes)

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode."""
        return super().train(False)

    def has_logits(self, task: Tensor | int | Sequence[int]) -> Tensor:
        """Which samples the teacher has logits for: booleans [B]. The others are left to the feature transfer.

        Args:
            task: task index of each sample.

        Raises:
            LoRKDError: a task out of range.
        """
        device = task.device if isinstance(task, Tensor) else None
        return torch.tensor([self._known[t] for t in self._indices(task)], dtype=torch.bool, device=device)

    @torch.no_grad()
    def forward(
        self, x: Tensor, task: Tensor | int | Sequence[int], return_features: bool = False, shown: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The teacher's logits for each sample's own task.

        Args:
            x: batch, BCHW[D]. In 2D, one channel is repeated for a network that takes three, and three are averaged
                for one that takes one.
            task: task index of each sample, LongTensor[B]; a single one serves the whole batch.
            return_features: also return the input of the network's last layer, pooled over space: B × D.
            shown: the batch has the teacher's own intensities already, see `TaskDataset.show_to`.

        Returns:
            B × C_max × …, C_max being the most classes of a task: -inf past a sample's own classes and in a class
            that a sigmoid teacher does not know. All NaN in the samples without logits (see :meth:`has_logits`): the
            losses leave them out, and they cannot be mistaken for an answer.

        Raises:
            LoRKDError: a task out of range, image channels that don't fit, or an output with too few channels.
        """
        tasks = self._rows(x, task)
        x = self._adapted(x, tasks, shown)
        with _collect_head_inputs() as found:
            y = first_tensor(self.network(x))
        if self.intensity is not None:
            y = self.intensity.answer(y, x)
        most = max((max(_flat(c)) for c in self.channels.values() if c is not None), default=-1)
        if y.ndim < 2 or y.shape[0] != x.shape[0] or y.shape[1] <= most:
            raise LoRKDError(
                f"the teacher's output has shape {tuple(y.shape)}; expected {x.shape[0]} × at least {most + 1} channels"
            )
        out = y.new_full((y.shape[0], max(self.num_classes.values()), *y.shape[2:]), float("-inf"))
        for t in sorted(set(tasks)):
            rows = torch.tensor([i for i, other in enumerate(tasks) if other == t], device=y.device)
            channels = self.channels[self.tasks[t]]
            if channels is None:
                out[rows] = float("nan")
            else:
                own = y.index_select(0, rows)
                for position, channel in enumerate(channels):
                    if channel is not None:
                        out[rows, position] = _logit(own, channel)
        return (out, _main_features(found)) if return_features else out

    @torch.no_grad()
    def features_of(self, x: Tensor, task: Tensor | int | Sequence[int] = 0) -> Tensor:
        """The input of the network's last layer, pooled over space: B × D.

        Args:
            x: batch, BCHW[D].
            task: whose images these are, which counts only where the teacher wants other intensities.

        Raises:
            LoRKDError: the last layer can't be found; name it with ``head=…``.
        """
        with _collect_head_inputs() as found:
            self.network(self._adapted(x, self._rows(x, task)))
        return _main_features(found)

    def _rows(self, x: Tensor, task: Tensor | int | Sequence[int]) -> list[int]:
        """The task of each row of ``x``."""
        tasks = self._indices(task)
        if len(tasks) not in (1, x.shape[0]):
            raise LoRKDError(f"task has {len(tasks)} entries for a batch of {x.shape[0]} samples")
        return tasks * x.shape[0] if len(tasks) == 1 else tasks

    def _indices(self, task: Tensor | int | Sequence[int]) -> list[int]:
        tasks = task_list(task)
        wrong = [t for t in tasks if not 0 <= t < len(self._known)]
        if wrong or not tasks:
            raise LoRKDError(f"task {wrong[:1] or 'is empty'}: the teacher serves tasks 0 to {len(self._known) - 1}")
        return tasks

    def _adapted(self, x: Tensor, tasks: Sequence[int], shown: bool = False) -> Tensor:
        x = self._channels_adapted(x.as_tensor() if hasattr(x, "as_tensor") else x)
        return x if self.intensity is None else self.intensity(x, tasks, shown)

    def _channels_adapted(self, x: Tensor) -> Tensor:
        wanted, came = self.in_channels, x.shape[1]
        if wanted is None or wanted == came:
            return x
        check_channels(wanted, came, x.ndim - 2)
        return x.mean(1, keepdim=True) if wanted == 1 else x.expand(-1, wanted, *x.shape[2:])


def _checked(name: str, channels: Sequence[Channel], classes: int, activation: str) -> list[Channel]:
    if isinstance(channels, (str, int)) or len(channels) != classes:
        raise LoRKDError(f"channels of task {name!r}: expected one for each of its {classes} classes, got {channels!r}")
    if activation == "softmax" and any(c is None for c in channels):
        raise LoRKDError(f"channels of task {name!r}: a softmax teacher must have all its classes: {channels!r}")
    flat = _flat(channels)
    if not flat or min(flat) < 0 or len(set(flat)) != len(flat):
        raise LoRKDError(f"channels of task {name!r}: expected different numbers from 0, got {channels!r}")
    return [c if c is None or isinstance(c, int) else tuple(c) for c in channels]


def _flat(channels: Sequence[Channel]) -> list[int]:
    return [i for c in channels if c is not None for i in ((c,) if isinstance(c, int) else c)]


def _logit(y: Tensor, channel: int | Sequence[int]) -> Tensor:
    if isinstance(channel, int):
        return y[:, channel]
    return y[:, list(channel)].logsumexp(1)


_HEAD_INPUTS: ContextVar[list[tuple[nn.Module, Tensor]] | None] = ContextVar("lorkd_teacher_features", default=None)


@contextmanager
def _collect_head_inputs() -> Iterator[list[tuple[nn.Module, Tensor]]]:
    calls: list[tuple[nn.Module, Tensor]] = []
    token = _HEAD_INPUTS.set(calls)
    try:
        yield calls
    finally:
        _HEAD_INPUTS.reset(token)


def _note_head_input(head: nn.Module, args: tuple) -> None:
    found = _HEAD_INPUTS.get()
    if found is not None and args:
        found.append((head, args[0]))


def _main_features(found: list[tuple[nn.Module, Tensor]]) -> Tensor:
    if not found:
        raise LoRKDError("the teacher's last layer could not be found, so that it gives no features: name it, head=…")
    return pooled_head_input([(x, -1 if isinstance(head, nn.Linear) else 1) for head, x in found])


def check_channels(wanted: int, came: int, dims: int, name: str = "the teacher") -> None:
    """Refuse images whose channels a teacher can't take: in 2D it takes grey for colours, and colours for grey.

    Raises:
        LoRKDError: other channels are missing or too many; they are not filled with copies of the image.
    """
    if wanted != came and (dims != 2 or {wanted, came} != {1, 3}):
        raise LoRKDError(
            f"{name} takes images of {wanted} channels, got {came}: give the student images with the same channels, in "
            "the teacher's order (a list of files, one for each channel, and --in_channels), or choose another teacher"
        )


def channels_of(network: nn.Module) -> int | None:
    """Channels of the images that a network takes: those of its first convolution; None where it has none."""
    convolutions = (m for m in network.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)))
    first = next(convolutions, None)
    return None if first is None else first.in_channels
