"""The settings that a run is started with, checked at once, before any image is read."""

from __future__ import annotations

from typing import Any

from lorkd_monai.settings import BUNDLE_SETTINGS, check_values

__all__ = ["check_settings"]


def check_settings(**settings: Any) -> None:
    """Check settings of a run by their names: the top-level keys of the training bundles' ``configs/train.yaml``.

    Args:
        settings: name -> value. A name without a rule in `lorkd_monai.settings` is left to what uses it.

    Raises:
        LoRKDError: listing every value that breaks its rule.

    Example::

        check_settings(max_epochs=20, learning_rate=1e-3)
    """
    check_values(settings, BUNDLE_SETTINGS)
