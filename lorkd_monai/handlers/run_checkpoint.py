"""Checkpoints of a run: the last state, to resume from, and the best weights."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from torch import nn

from lorkd_monai.checkpoints.weights import fit_weights
from lorkd_monai.data.identity import differences
from lorkd_monai.errors import LoRKDError
from lorkd_monai.files import atomic_file, remove_leftovers

__all__ = ["RunCheckpoint", "refuse_other_run"]

_log = logging.getLogger(__name__)


class RunCheckpoint:
    """Save a run after each epoch, and resume it: a run may be killed at any moment.

    ``last.pt`` holds everything that the run needs to go on. ``model.pt`` holds the weights of the epoch with the
    best score on the validation images (the first of equals), as a flat state dict. Both are written to a temporary
    file and then moved, so that a killed run leaves the earlier file whole.

    If ``last.pt`` exists when the run starts, the run goes on from there; its settings must be the same, see
    `differences`. If that run is complete, nothing is trained.

    Args:
        folder: where the two files are.
        network: the network in training, also one in a `DistributedDataParallel`.
        objects: more objects with ``state_dict`` and ``load_state_dict``, by name: optimizer, scheduler, ….
        settings: what must be the same for a run to go on, as plain data: seed, batch size, ….
        evaluator: gives the score, in ``state.metrics[state.key_metric_name]``; None: the last epoch counts as best.
            Epochs without evaluation count only until the first evaluation.
        kept: the network whose weights go to ``model.pt``, such as a `WeightAverage`'s; None: the one in training.

    Raises:
        LoRKDError: at the start of the run, if ``last.pt`` can't be read or belongs to another run.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        network: nn.Module,
        objects: Mapping[str, Any],
        settings: Mapping[str, Any],
        evaluator: Engine | None = None,
        kept: nn.Module | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.network: nn.Module = getattr(network, "module", network)
        self.kept = self.network if kept is None else kept
        self.objects = dict(objects)
        self.settings = dict(settings)
        self.evaluator = evaluator
        self.best: dict[str, float] = {}

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, after the handler that validates."""
        engine.add_event_handler(Events.STARTED, self.resume)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    @property
    def last(self) -> Path:
        """The file to resume from."""
        return self.folder / "last.pt"

    @property
    def model(self) -> Path:
        """The best weights."""
        return self.folder / "model.pt"

    def resume(self, engine: Engine) -> None:
        """Go on from ``last.pt`` if there is one."""
        refuse_other_run(self.folder, self.settings)
        if idist.get_rank() == 0:
            for path in (self.last, self.model):
                remove_leftovers(path)
        if not self.last.exists():
            return
        state = _read(self.last)
        try:
            self._load(state["network"])
            for name, item in self._all_objects(engine).items():
                item.load_state_dict(state["objects"][name])
        except (KeyError, RuntimeError, ValueError, TypeError) as e:
            reason = str(e).strip().splitlines() or [type(e).__name__]
            raise LoRKDError(
                f"{self.last} does not fit this run: {reason[0]}. Start with the settings and tasks that it was made "
                "with, or give another --output_dir to start fresh"
            ) from e
        self.best = dict(state["best"])
        engine.state.epoch = state["epoch"]
        engine.state.iteration = engine.state.epoch * engine.state.epoch_length
        _log.info("resuming after epoch %d of %d from %s", engine.state.epoch, engine.state.max_epochs, self.last)

    def save(self, engine: Engine) -> None:
        """Write ``last.pt``, and ``model.pt`` if this epoch is the best."""
        score = self._score(engine)
        better = "score" not in self.best if score is None else score > self.best.get("score", float("-inf"))
        if better:
            self.best = {"epoch": engine.state.epoch, **({} if score is None else {"score": score})}
        if idist.get_rank() != 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if better:
            _write(self.kept.state_dict(), self.model)
        state = {
            "network": self.network.state_dict(),
            "objects": {name: item.state_dict() for name, item in self._all_objects(engine).items()},
            "epoch": engine.state.epoch,
            "best": self.best,
            "settings": self.settings,
        }
        _write(state, self.last)

    def _score(self, engine: Engine) -> float | None:
        """The score of this epoch; None if it was not evaluated, or is not finite."""
        if self.evaluator is None:
            return float(engine.state.epoch)
        state = self.evaluator.state
        if state.epoch != engine.state.epoch or state.key_metric_name not in state.metrics:
            return None
        score = float(state.metrics[state.key_metric_name])
        return score if math.isfinite(score) else None

    def _load(self, state: Mapping[str, Any]) -> None:
        try:
            self.network.load_state_dict(state)
        except RuntimeError:
            fit_weights(self.network, state, "its network")  # says in one line what differs
            raise

    def _all_objects(self, engine: Engine) -> dict[str, Any]:
        """The given objects, and the gradient scaler of mixed precision if there is one."""
        scaler = getattr(engine, "scaler", None)
        return self.objects if scaler is None else {**self.objects, "scaler": scaler}


def refuse_other_run(folder: str | os.PathLike, settings: Mapping[str, Any]) -> None:
    """Raise if ``last.pt`` of a folder was made with other settings; only the settings are read.

    Raises:
        LoRKDError: the settings differ, or the file is not a checkpoint of a run.
    """
    last = Path(folder) / "last.pt"
    changed = differences(_read(last, mmap=True)["settings"], settings) if last.exists() else []
    if changed:
        raise LoRKDError(
            f"{last} belongs to a run with other settings: {'; '.join(changed)}. Give them again to go on with it, or "
            "give another --output_dir to start fresh"
        )


def _read(last: Path, mmap: bool = False) -> dict[str, Any]:
    try:
        state = torch.load(last, map_location="cpu", weights_only=True, mmap=mmap)
        return {key: state[key] for key in ("network", "objects", "epoch", "best", "settings")}
    except Exception as e:
        raise LoRKDError(
            f"{last} can't be resumed from: it is not a checkpoint of a run ({type(e).__name__}). Delete it to "
            "start fresh, or give another --output_dir"
        ) from e


def _write(state: Mapping, path: Path) -> None:
    with atomic_file(path) as temporary:
        torch.save(state, temporary)
