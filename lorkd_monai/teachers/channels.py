"""Which channels of a teacher's output are the classes of a task, by their names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lorkd_monai.errors import LoRKDError
from lorkd_monai.teachers.teacher import Channel

__all__ = ["channels_by_name", "labels_of", "plain_name"]

_BACKGROUND = "background"


def channels_by_name(
    channel_def: Mapping[Any, str],
    labels: Mapping[str, Mapping[int, str]],
    activation: str = "softmax",
) -> dict[str, list[Channel] | None]:
    """The channel of each class of each task in a teacher's output, found by the classes' names.

    A class is looked for as ``"<task>: <class>"`` first, then as ``"<class>"``; upper and lower case, spaces and
    underscores make no difference. A class "background" that the teacher does not have for this task is, for a softmax
    teacher, all channels that are not of the task's other classes; for a sigmoid teacher, unknown.

    Args:
        channel_def: channel -> class name, as in the metadata of a MONAI bundle (``{"0": "background", …}``).
        labels: task -> class id -> class name.
        activation: ``"softmax"`` or ``"sigmoid"``.

    Returns:
        For each task what `Teacher` takes as its channels; None where the teacher knows none of its classes.

    Raises:
        LoRKDError: no task has any class in the teacher, or some tasks have some of their classes only; all that was
            not found is listed.

    Example::

        >>> channels_by_name({"0": "background", "1": "spleen", "2": "liver"}, {"liver": {0: "background", 1: "Liver"}})
        {'liver': [(0, 1), 2]}
    """
    channels = {int(k): str(v) for k, v in channel_def.items()}
    found: dict[str, list[Channel] | None] = {}
    problems = []
    for task, classes in labels.items():
        names = [str(classes[i]) for i in sorted(classes)]
        matches = [_find(channels, task, name) for name in names]
        foreground = [i for i, name in enumerate(names) if plain_name(name) != _BACKGROUND]
        if not any(matches[i] for i in foreground):
            found[task] = None
            continue
        problems += [
            f"{task}: {names[i]!r} "
            + (f"is the name of several channels {matches[i]}" if matches[i] else "is no class of the teacher")
            for i in foreground
            if len(matches[i]) != 1
        ]
        own = {c for i in foreground for c in matches[i]}
        entries: list[Channel] = []
        for i, name in enumerate(names):
            if i in foreground:
                entries.append(matches[i][0] if matches[i] else None)
            elif _qualified(channels, task, name):
                entries.append(_qualified(channels, task, name)[0])
            else:
                rest = tuple(c for c in sorted(channels) if c not in own)
                entries.append(None if activation == "sigmoid" or not rest else rest if len(rest) > 1 else rest[0])
        found[task] = entries
    shown = ", ".join(list(channels.values())[:40])
    if problems:
        raise LoRKDError(
            f"the teacher knows some classes of a task but not all: {'; '.join(problems)}. Its classes are: {shown}. "
            "Name the classes in the data list as the teacher does, or give the channels of each task yourself"
        )
    if not any(entries for entries in found.values()):
        wanted = "; ".join(f"{t}: {', '.join(map(str, c.values()))}" for t, c in labels.items())
        raise LoRKDError(f"the teacher knows no class of any task. Its classes are: {shown}. The tasks' are: {wanted}")
    return found


def labels_of(tasks: Mapping[str, Any]) -> dict[str, Mapping[int, str]]:
    """The class names of each task by id: of objects with ``labels`` (`TaskSpec`), or the names themselves."""
    return {name: getattr(task, "labels", task) for name, task in tasks.items()}


def plain_name(name: str) -> str:
    """A class name without case, spaces and underscores, which make no difference."""
    return re.sub(r"[\s_]+", "", name).casefold()


def _matching(channels: Mapping[int, str], name: str) -> list[int]:
    exact = [c for c, other in channels.items() if other == name]
    return exact if len(exact) == 1 else [c for c, other in channels.items() if plain_name(other) == plain_name(name)]


def _qualified(channels: Mapping[int, str], task: str, name: str) -> list[int]:
    return _matching(channels, f"{task}: {name}")


def _find(channels: Mapping[int, str], task: str, name: str) -> list[int]:
    return _qualified(channels, task, name) or _matching(channels, name)
