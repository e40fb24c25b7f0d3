"""The start and the end of a training run: one run at a time in a folder, and only the run that it belongs to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import ignite.distributed as idist

from lorkd_monai.errors import LoRKDError
from lorkd_monai.handlers.run_checkpoint import refuse_other_run
from lorkd_monai.locks import claim, release

__all__ = ["begin_run", "end_run"]


def begin_run(folder: str | os.PathLike, settings: Mapping[str, Any]) -> None:
    """Claim the folder of a run before anything is read, trained or written in it.

    The claim ends with the process, also where it is killed. The processes of one torchrun are one run: the first
    claims for all.

    Args:
        folder: of the run's checkpoints.
        settings: of its `RunCheckpoint`.

    Raises:
        LoRKDError: another process trains in the folder, or ``last.pt`` in it belongs to another run.
    """
    problem = "none"
    if idist.get_rank() == 0:
        try:
            claim(folder, "Wait until that run has ended, or give another --output_dir")
        except LoRKDError as error:
            problem = str(error)
    problem = idist.broadcast(problem, src=0)
    if problem != "none":
        raise LoRKDError(problem)
    try:
        refuse_other_run(folder, settings)
    except LoRKDError:
        end_run()
        raise


def end_run() -> None:
    """Let other processes into the folders of this process's runs."""
    release()
