"""The numbers that a run is started with, checked at once, before any image is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorkd_monai.checks import is_real, is_whole
from lorkd_monai.errors import LoRKDError
from lorkd_monai.losses.transfer import POSITIONS

__all__ = ["check_settings"]


def _size(value: object) -> bool:
    return is_whole(value) or (isinstance(value, list) and 2 <= len(value) <= 3 and all(map(is_whole, value)))


_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        (
            "max_epochs",
            "pretrain_epochs",
            "batch_size",
            "in_channels",
            "accumulation_steps",
            "val_interval",
            "sw_batch_size",
        ),
        ("a whole number of at least 1", is_whole),
    ),
    "seed": ("a whole number of at least 0", lambda v: is_whole(v, 0)),
    **dict.fromkeys(
        ("image_size", "patch_size"), ("a whole number of at least 1, or a list of one for each axis", _size)
    ),
    **dict.fromkeys(("learning_rate", "temperature"), ("a number above 0", lambda v: is_real(v) and v > 0)),
    **dict.fromkeys(
        ("weight_decay", "transfer_weight", "rotate"), ("a number of at least 0", lambda v: is_real(v) and v >= 0)
    ),
    "tasks_per_batch": (
        "a whole number of at least 1, or null for batches of all tasks mixed",
        lambda v: v is None or is_whole(v),
    ),
    "sampling_temperature": ("a number of at least 1", lambda v: is_real(v) and v >= 1),
    "alpha": ("a number", is_real),
    "ema": ("a number from 0 to below 1", lambda v: is_real(v) and 0 <= v < 1),
    "cache_teacher": (
        "True, False, or the number of fixed views of each image",
        lambda v: isinstance(v, bool) or is_whole(v, 0),
    ),
    "flip_axes": (
        "a list of axes of the image, such as [0, 1], or []",
        lambda v: isinstance(v, (list, tuple)) and all(is_whole(n, 0) and n <= 2 for n in v),
    ),
    "init": ("'auto', 'teacher' or 'random'", lambda v: v in ("auto", "teacher", "random")),
    "transfer_positions": (" or ".join(map(repr, POSITIONS)), lambda v: v in POSITIONS),
    **dict.fromkeys(("amp", "overwrite", "nested"), ("True or False", lambda v: isinstance(v, bool))),
}


def check_settings(**settings: Any) -> None:
    """Check settings of a run by their names: the top-level keys of the training bundles' ``configs/train.yaml``.

    Args:
        settings: name -> value. A name without a rule here is left to what uses it.

    Raises:
        LoRKDError: listing every setting that is out of its range or no number at all.

    Example::

        check_settings(max_epochs=20, learning_rate=1e-3)
    """
    problems = [
        f"{name} must be {_RULES[name][0]}, got {value!r}"
        for name, value in settings.items()
        if name in _RULES and not _RULES[name][1](value)
    ]
    size, few = settings.get("batch_size"), settings.get("tasks_per_batch")
    if not problems and size is not None and few is not None and few > size:
        problems.append(f"tasks_per_batch must be at most batch_size ({size}), got {few}")
    if problems:
        raise LoRKDError("; ".join(problems))
