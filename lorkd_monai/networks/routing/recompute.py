"""The routing of layers that are computed again in a backward pass (gradient checkpointing).

A backward pass runs outside of :func:`~lorkd_monai.networks.routing.table.route`, on CUDA even in a thread of
autograd's own, where no context variable of the caller can be seen. But autograd gives every backward pass a number,
which its threads know; and it works backwards: a hook on the outputs of a network call fires before anything inside
that call is computed again, and after everything inside calls that came later. So the hook notes whose turn it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lorkd_monai.networks.routing.table import Routing

__all__ = ["recomputed_routing", "remember_routing"]

_CURRENT: dict[int, Routing] = {}  # by the number of the backward pass


def remember_routing(outputs: object, routing: Routing) -> None:
    """Let the layers behind ``outputs`` find ``routing`` again while they are computed a second time."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    for output in tree_leaves(outputs):
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(functools.partial(_enter, routing))


def _enter(routing: Routing, gradient: Tensor) -> None:
    number = torch._C._current_graph_task_id()
    if number not in _CURRENT:
        forget: Callable[..., Any] = functools.partial(_CURRENT.pop, number, None)
        torch.autograd.Variable._execution_engine.queue_callback(forget)
    _CURRENT[number] = routing


def recomputed_routing() -> Routing | None:
    """The routing of the network call that the running backward pass has reached; None outside of one."""
    return _CURRENT.get(torch._C._current_graph_task_id()) if _CURRENT else None
