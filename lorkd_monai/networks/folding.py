"""Finding out how a network folds its batch.

Transformers with windows and networks that work on patches call their layers with more rows than there are samples.
Which row belongs to which sample can't be read off a shape: a row order is not part of it, and a sequence-first layer
may even have as many rows as the batch by chance. So it is measured: a batch of two samples is passed twice as it
is, for the noise, and twice with one of the samples replaced; the rows that change at a layer belong to that sample.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks.routing import RoutedModule, watch_inputs

__all__ = ["find_folding"]

# An untouched row counts as moved only beyond this multiple of what two equal passes differ by (mostly nothing at all).
_NOISE_MARGIN = 8

# Norms are switched to evaluation mode for the measurement: one at a time.
_LOCK = threading.Lock()


@torch.no_grad()
def find_folding(
    call: Callable[[Tensor], object], network: nn.Module, modules: Iterable[RoutedModule], x: Tensor
) -> dict[RoutedModule, str]:
    """How each routed module that a forward pass reaches holds the batch in dim 0 of its input.

    Args:
        call: runs the network on a batch, with every routed module on one task.
        network: the network, for its norm layers.
        modules: the routed modules to find out about.
        x: a batch, for its shape, type and range of values.

    Returns:
        ``"rows"``, ``"major"`` or ``"minor"`` (see :class:`RoutedModule`) for each module that was reached.

    Raises:
        LoRKDError: at some module the rows do not follow the samples in one of these ways; it names the module.
    """
    base = torch.stack([x[0], x[-1]])
    spread = base.float().std().clamp_min(1e-3).to(base.dtype)
    generator = torch.Generator().manual_seed(0)

    def other(index: int) -> Tensor:
        changed = base.clone()
        noise = torch.randn(base[0].shape, generator=generator).to(base)
        changed[index] = base[index] + spread * noise
        return changed

    modules = list(modules)
    with _LOCK:
        passes = _record(call, network, modules, [base, base, other(0), other(1)])
    return {m: _fold_of(m, [p[m] for p in passes]) for m in modules if passes[0][m]}


def _record(
    call: Callable, network: nn.Module, modules: list[RoutedModule], batches: list[Tensor]
) -> list[dict[RoutedModule, list[Tensor]]]:
    """A fingerprint of each row of each input of each module, pass by pass."""
    # Batch statistics would mix the samples, and the running ones must stay as they are.
    norms = [m for m in network.modules() if getattr(m, "track_running_stats", False) and m.training]
    for norm in norms:
        norm.training = False
    passes: list[dict[RoutedModule, list[Tensor]]] = []
    devices = [batches[0].device] if batches[0].is_cuda else []
    try:
        for batch in batches:
            seen: dict[RoutedModule, list[Tensor]] = {m: [] for m in modules}
            passes.append(seen)
            with torch.random.fork_rng(devices), watch_inputs(lambda m, x, s=seen: s[m].append(_fingerprint(x))):
                torch.manual_seed(0)  # dropout must fall alike in every pass, and leave no trace
                call(batch)
    finally:
        for norm in norms:
            norm.training = True
    return passes


def _fingerprint(x: Tensor) -> Tensor:
    rows = x.detach().reshape(x.shape[0], -1).double()
    return torch.stack([rows.abs().sum(1), rows.square().sum(1)], 1).cpu()


def _fold_of(module: RoutedModule, passes: list[list[Tensor]]) -> str:
    folds = set()
    for base, again, *others in zip(*passes, strict=True):
        rows = base.shape[0]
        noise = (again - base).abs().amax(0) * _NOISE_MARGIN
        owner = [set() for _ in range(rows)]
        for sample, changed in enumerate(others):
            moved = ((changed - base).abs() > noise).any(1)
            for row in moved.nonzero().flatten().tolist():
                owner[row].add(sample)
        folds.add(_rule(owner, rows))
    if len(folds) != 1 or None in folds:
        raise LoRKDError(
            f"{module._who()}: the rows of its input do not follow the samples of the batch, so a batch of several "
            f"tasks can't be routed through it. Exclude it (exclude=[{module.name!r}]) or give one task at a time"
        )
    return folds.pop()


def _rule(owner: list[set[int]], rows: int) -> str | None:
    """The folding that explains which rows each of two samples moved; None where none, or more than one, does."""
    if rows % 2 or not any(owner):
        return None
    times = rows // 2
    fits = {
        name: all(o <= {sample(row)} for row, o in enumerate(owner)) and {0, 1} <= set().union(*owner)
        for name, sample in (("major", lambda r: r // times), ("minor", lambda r: r % 2))
    }
    if times == 1:
        return "rows" if fits["major"] else None
    matching = [name for name, fit in fits.items() if fit]
    return matching[0] if len(matching) == 1 else None
