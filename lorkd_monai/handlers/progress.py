"""A progress bar over the iterations of each epoch, on a terminal only."""

from __future__ import annotations

import sys

from ignite.engine import Engine
from ignite.handlers.tqdm_logger import ProgressBar

__all__ = ["TerminalProgress"]


class TerminalProgress:
    """Show ignite's progress bar with the total loss where standard error is a terminal; do nothing elsewhere."""

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        if sys.stderr.isatty():
            bar = ProgressBar(desc="epoch", persist=False)
            bar.attach(engine, output_transform=lambda output: {"loss": output["terms"]["total"]})
