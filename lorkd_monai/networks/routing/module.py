"""The base of all modules that treat the rows of a batch by task."""

from __future__ import annotations

import functools

from torch import Tensor, nn

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks.routing.recompute import recomputed_routing
from lorkd_monai.networks.routing.table import _ROUTING, _WATCH, Routing

__all__ = ["RoutedModule", "UnverifiedFolding", "refuse_direct_calls"]


class UnverifiedFolding(LoRKDError):
    """A mixed batch reached a module for which it is not known which rows belong to which sample."""


class RoutedModule(nn.Module):
    """Base of all modules that treat the rows of a batch by task.

    Attributes:
        name: name of the module in its network, for messages.
        fold: how dim 0 of the input holds the batch: ``"rows"``: one row a sample; ``"major"`` and ``"minor"``: see
            :meth:`Routing.expand`; None: not known yet, mixed batches are refused (:class:`LoRKDNet` finds out).
    """

    def __init__(self, num_tasks: int, name: str = "") -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.name = name
        self.fold: str | None = "rows"

    def routing(self, x: Tensor) -> Routing:
        """The routing of the rows of ``x``.

        Raises:
            LoRKDError: no routing is in force, a task is out of range, or ``x`` does not hold one row a sample.
        """
        routing, watch = _ROUTING.get(), _WATCH.get()
        if watch is not None:
            watch(self, x)
        routing = recomputed_routing() if routing is None else routing
        if routing is None:
            raise LoRKDError(
                f"{self._who()} was called without a routing: call the LoRKDNet with a task, or use `with route(task):`"
            )
        if routing.present[-1] >= self.num_tasks:
            raise LoRKDError(
                f"{self._who()} has experts for {self.num_tasks} tasks (0 to {self.num_tasks - 1}), "
                f"got task {routing.present[-1]}"
            )
        if routing.uniform is not None:
            return routing
        if self.fold is None:
            raise UnverifiedFolding(
                f"{self._who()} was not reached when the routing of this network was verified, so a batch of several "
                "tasks cannot be routed through it: call it with one task at a time, or exclude this layer"
            )
        rows = x.shape[0]
        if rows != routing.size and (self.fold == "rows" or rows % len(routing.tasks)):
            raise UnverifiedFolding(
                f"{self._who()} got {rows} rows for a batch of {routing.size} samples of several tasks, and it is not "
                "known which row belongs to which sample: call it with one task at a time, or exclude this layer"
            )
        return routing.expand(rows, self.fold)

    def learn_fold(self, fold: str) -> None:
        """Take over a folding that was found out; ``"rows"`` is also what the others look like in small images.

        Raises:
            LoRKDError: another one was found before.
        """
        if self.fold in (None, "rows") or fold == self.fold:
            self.fold = fold
        elif fold != "rows":
            raise LoRKDError(
                f"{self._who()} holds the samples of a batch in another order than before: a batch of several tasks "
                "can't be routed through it. Call it with one task at a time, or exclude this layer"
            )

    def _who(self) -> str:
        return f"layer {self.name!r}" if self.name else type(self).__name__


def refuse_direct_calls(module: nn.Module, who: str) -> None:
    """Make every call of a module that was replaced an error: it would go past the experts."""
    module.register_forward_pre_hook(functools.partial(_refuse_direct_call, who))


def _refuse_direct_call(who: str, module: nn.Module, args: tuple) -> None:
    raise LoRKDError(
        f"{who} was called directly, past its experts: the network keeps a second reference to it, such as a plain "
        "list of layers. Register it once (nn.ModuleList), or exclude it"
    )
