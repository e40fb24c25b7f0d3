"""VISTA3D as a teacher: its class-prompted network answers for the classes of the tasks, one channel each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.networks.nets import VISTA3D
from torch import Tensor, nn

from lorkd_monai.errors import LoRKDError
from lorkd_monai.teachers.channels import channels_by_name, labels_of
from lorkd_monai.teachers.teacher import Teacher

__all__ = ["ClassPrompted", "vista_prompts", "vista_teacher"]

_BACKGROUND = 0  # VISTA3D has no prompt for it


class ClassPrompted(nn.Module):
    """A VISTA3D network with its class prompts fixed: B×1×H×W×D images to B×K×H×W×D logits, one for each class.

    The image is encoded once for all classes. The activation is a sigmoid, for each class separately.

    Args:
        network: ``monai.networks.nets.vista3d132()`` or another `VISTA3D`. Its point prompts are not used.
        classes: the K class indices, as published with the network's weights.

    Raises:
        LoRKDError: another network, no classes, a class that comes twice, or one that the network has no embedding of.
    """

    def __init__(self, network: nn.Module, classes: Sequence[int]) -> None:
        super().__init__()
        if not isinstance(network, VISTA3D):
            raise LoRKDError(f"expected a VISTA3D network, got a {type(network).__name__}")
        known = network.class_head.class_embeddings.num_embeddings
        wrong = [c for c in classes if not isinstance(c, int) or not 0 < c < known]
        if wrong or not classes or len(set(classes)) != len(classes):
            raise LoRKDError(f"class prompts must be different numbers in 1..{known - 1}, got {list(classes)}")
        self.network = network
        self.register_buffer("classes", torch.tensor(list(classes)).view(-1, 1), persistent=True)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of every class, in the order of ``classes``."""
        _, features = self.network.image_encoder(x, with_point=False, with_label=True)
        logits, _ = self.network.class_head(features, self.classes)  # K × B × …
        return logits.transpose(0, 1)


def vista_prompts(tasks: Mapping[str, Any], names: Mapping[int, str] | None = None) -> dict[str, list[int | None]]:
    """The class prompt of every class of every task.

    A task of the data list may state it: ``"vista3d_class": {"1": 3}``, class id -> index in VISTA3D. Else the names of
    the classes are looked up among the published ones. The background has none: it is everything that no prompt finds.

    Args:
        tasks: task -> `TaskSpec`, or its class names by id.
        names: index in VISTA3D -> class name, such as the ``channel_def`` of its bundle.

    Raises:
        LoRKDError: a class without a prompt, in a task that has others.
    """
    labels = labels_of(tasks)
    said: dict[str, Any] = {task: getattr(spec, "vista3d_class", None) for task, spec in tasks.items()}
    open_tasks = {task: labels[task] for task in tasks if not said[task]}
    if open_tasks and not names:
        raise LoRKDError(
            f"VISTA3D's class names are not known, and the data list gives no prompts for {', '.join(open_tasks)}: "
            'add "vista3d_class": {"1": …} to these tasks'
        )
    foreground = {index: name for index, name in (names or {}).items() if index != _BACKGROUND}
    found = channels_by_name(foreground, open_tasks, "sigmoid") if open_tasks else {}
    prompts: dict[str, Any] = {}
    for task, classes in labels.items():
        if not said[task]:
            prompts[task] = found[task]
            continue
        wrong = [i for i in said[task] if i not in classes]
        lacking = [classes[i] for i in sorted(classes) if i not in said[task] and i != _BACKGROUND]
        if wrong or lacking:
            raise LoRKDError(
                f"task {task!r}: vista3d_class must give a prompt for each class but the background; "
                + (f"it has no class {wrong[0]}" if wrong else f"{', '.join(lacking)} lack one")
            )
        prompts[task] = [said[task].get(i) for i in sorted(classes)]
    return prompts


def vista_teacher(
    network: nn.Module,
    tasks: Mapping[str, Any],
    names: Mapping[int, str] | None = None,
    only: Sequence[str] | None = None,
    **options: Any,
) -> Teacher:
    """A teacher of per-region experts from VISTA3D, prompted with the classes of the data list.

    Args:
        network: the network with its weights.
        tasks, names: see :func:`vista_prompts`.
        only: the tasks to prompt for; the teacher then has no logits for the others. None: all.
        options: other arguments of `Teacher`, such as ``intensity``.

    Raises:
        LoRKDError: see :func:`vista_prompts` and :class:`ClassPrompted`.

    Example::

        network = monai.networks.nets.vista3d132()
        teacher = vista_teacher(network, {"spleen": {0: "background", 1: "spleen"}}, {3: "spleen"})
        logits = teacher(torch.rand(1, 1, 64, 64, 64), 0)   # channel 0, the background, is -inf
    """
    prompts = vista_prompts(tasks if only is None else {name: tasks[name] for name in only}, names)
    classes = sorted({c for own in prompts.values() for c in own or () if c is not None})
    channels = {
        task: None if own is None else [None if c is None else classes.index(c) for c in own]
        for task, own in prompts.items()
    }
    counts = {task: len(classes) for task, classes in labels_of(tasks).items()}
    return Teacher(ClassPrompted(network, classes), channels, counts, "sigmoid", in_channels=1, **options)
