"""A running average of a network's weights: a run validates, selects and keeps the average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lorkd_monai.errors import LoRKDError

__all__ = ["WeightAverage"]


class WeightAverage:
    """Average a network's weights over the steps of its training (exponential moving average), with `AveragedModel`.

    After step n the average keeps a share of min(``share``, (1 + n) / (10 + n)) of itself and takes the rest from the
    network: the share grows, so that the first steps are soon forgotten. Buffers, such as batch-norm statistics, are
    copied from the network. A weight that does not change in training stays bit-identical in the average.

    Args:
        network: the network in training, also one in a `DistributedDataParallel`.
        share: from 0 to below 1; 0: no averaging.

    Attributes:
        network: the averaged network; without averaging, the network in training itself.

    Raises:
        LoRKDError: ``share`` is not in its range.

    Example::

        average = WeightAverage(network, 0.98)
        average.attach(trainer)
        evaluator = TaskEvaluator(device, loader, average.network)
    """

    def __init__(self, network: nn.Module, share: float) -> None:
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise LoRKDError(f"share of a weight average: expected a number from 0 to below 1, got {share!r}")
        self.share = share
        self._trained = getattr(network, "module", network)
        self._average: Any = AveragedModel(self._trained, multi_avg_fn=self._step) if share else None
        self.network: nn.Module = self._average.module if self._average else self._trained

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, before the handlers that validate or save."""
        if self._average is not None:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._update)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._take_buffers)

    def state_dict(self) -> dict[str, Any]:
        """The average and its number of steps; empty without averaging."""
        return {} if self._average is None else self._average.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state of another average of the same network."""
        if self._average is not None:
            self._average.load_state_dict(state)

    def _update(self, engine: Engine) -> None:
        self._average.update_parameters(self._trained)

    @torch.no_grad()
    def _take_buffers(self, engine: Engine) -> None:
        # Several processes share their buffers at the end of an epoch, after its last step.
        for own, trained in zip(self.network.buffers(), self._trained.buffers(), strict=True):
            own.copy_(trained)

    @torch.no_grad()
    def _step(self, average: Sequence[Tensor], trained: Sequence[Tensor], _: Any) -> None:
        n = int(self._average.n_averaged)  # a count in host memory: reading it does not wait for the GPU
        torch._foreach_lerp_(list(average), list(trained), 1 - min(self.share, (1 + n) / (10 + n)))
