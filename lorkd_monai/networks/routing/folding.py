"""Finding out how a network folds its batch.

Transformers with windows and networks that work on patches call their layers with more rows than there are samples.
Which row belongs to which sample can't be read off a shape: a row order is not part of it, and a sequence-first layer
may even have as many rows as the batch by chance. So it is measured: a batch of two samples is passed twice as it
is, for the noise, and twice with one of the samples replaced; the rows that change at a layer belong to that sample.
Deep in an untrained network a sample may leave no trace that survives the rounding; where that is so, the samples are
replaced by NaN, which nothing swallows.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks.routing.module import RoutedModule
from lorkd_monai.networks.routing.table import watch_inputs

__all__ = ["buffers_kept", "find_folding"]

# An untouched row counts as moved only beyond this multiple of what two equal passes differ by (mostly nothing at all).
_NOISE_MARGIN = 8

# Norms are switched to evaluation mode for the measurement: one network at a time.
_LOCK = threading.Lock()


@torch.compiler.disable  # it watches each call, which would be compiled for it alone
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
    noise = _noise_like(base[0]) * base.float().std().clamp_min(1e-3)

    def other(index: int, value: Tensor) -> Tensor:
        changed = base.clone()
        changed[index] = value.to(base.dtype)
        return changed

    if base.is_floating_point():
        batches = [base, base, other(0, base[0] + noise), other(1, base[1] + noise)]
    else:
        batches = [base, base, *(other(i, base.amin() + base.amax() - base[i]) for i in (0, 1))]
    modules = list(modules)
    with _LOCK, _untouched(network):
        passes = _record(call, modules, batches)
        reached = [m for m in modules if passes[0][m]]
        folds = {m: _fold_of([p[m] for p in passes]) for m in reached}
        if None in folds.values() and base.is_floating_point():
            nothing = torch.full_like(base[0], float("nan"))
            try:
                passes += _record(call, modules, [other(0, nothing), other(1, nothing)])
            except Exception:
                pass  # a network may refuse NaN; what the first passes left open then stays open
            else:
                folds = {m: folds[m] or _fold_of([p[m] for p in passes]) for m in reached}
    for module, fold in folds.items():
        if fold is None:
            raise LoRKDError(
                f"{module._who()}: the rows of its input do not follow the samples of the batch, so a batch of several "
                f"tasks can't be routed through it. Exclude it (exclude=[{module.name!r}]) or give one task at a time"
            )
    return {module: fold for module, fold in folds.items() if fold}


def _noise_like(sample: Tensor) -> Tensor:
    return torch.randn(sample.shape, generator=torch.Generator().manual_seed(0)).to(sample.device)


@contextmanager
def _untouched(network: nn.Module) -> Iterator[None]:
    """Norms in evaluation mode, since batch statistics would mix the samples; afterwards all buffers as before."""
    norms = [m for m in network.modules() if getattr(m, "track_running_stats", False) and m.training]
    for norm in norms:
        norm.training = False
    try:
        with buffers_kept(network):
            yield
    finally:
        for norm in norms:
            norm.training = True


@contextmanager
def buffers_kept(network: nn.Module) -> Iterator[None]:
    """After the block, all buffers are as before: some networks count their calls, or keep what they saw."""
    before = [(b, b._version, b.clone()) for b in network.buffers() if not b.is_inference()]
    try:
        yield
    finally:
        for buffer, version, value in before:
            if buffer._version != version:
                buffer.copy_(value)


def _note(seen: dict[RoutedModule, list[Tensor]], module: RoutedModule, x: Tensor) -> None:
    seen[module].append(_fingerprint(x))


def _record(
    call: Callable, modules: list[RoutedModule], batches: list[Tensor]
) -> list[dict[RoutedModule, list[Tensor]]]:
    """A fingerprint of each row of each input of each module, pass by pass."""
    passes: list[dict[RoutedModule, list[Tensor]]] = []
    devices = [batches[0].device] if batches[0].is_cuda else []
    for batch in batches:
        seen: dict[RoutedModule, list[Tensor]] = {m: [] for m in modules}
        passes.append(seen)
        with torch.random.fork_rng(devices), watch_inputs(functools.partial(_note, seen)):
            torch.manual_seed(0)  # dropout must fall alike in every pass, and leave no trace
            call(batch)
    return passes


def _fingerprint(x: Tensor) -> Tensor:
    rows = x.detach().reshape(x.shape[0], -1).double()
    return torch.stack([rows.abs().sum(1), rows.square().sum(1)], 1).cpu()


def _fold_of(passes: list[list[Tensor]]) -> str | None:
    """The folding that explains all calls of one module; None where there is none."""
    if len({len(p) for p in passes}) != 1:  # the network decides by the image whether to call it
        return None
    folds = set()
    for base, again, *others in zip(*passes):
        rows = base.shape[0]
        if any(len(o) != rows for o in (again, *others)):
            return None
        noise = (again - base).abs().amax(0) * _NOISE_MARGIN
        moved, lost = others[:2], others[2:]
        samples = _samples_of_rows([((o - base).abs() > noise).any(1) for o in moved])
        folds.add(_rule(samples) or (_rule(_with_lost(samples, base, lost)) if lost else None))
    return folds.pop() if len(folds) == 1 else None


def _samples_of_rows(touched: list[Tensor]) -> list[set[int]]:
    return [{sample for sample, rows in enumerate(touched) if rows[r]} for r in range(len(touched[0]))]


def _with_lost(samples: list[set[int]], base: Tensor, lost: list[Tensor]) -> list[set[int]]:
    """Rows that no sample moved go to the sample whose loss loses them."""
    found = _samples_of_rows([(o.isnan() & ~base.isnan()).any(1) for o in lost])
    return [known or new for known, new in zip(samples, found)]


def _rule(samples: list[set[int]]) -> str | None:
    """The folding that explains which rows each of two samples moved; None where none, or more than one, does."""
    rows = len(samples)
    if rows % 2 or not any(samples):
        return None
    times = rows // 2
    fits = {
        name: all(o <= {sample(row)} for row, o in enumerate(samples)) and {0, 1} <= set().union(*samples)
        for name, sample in (("major", lambda r: r // times), ("minor", lambda r: r % 2))
    }
    if times == 1:
        return "rows" if fits["major"] else None
    matching = [name for name, fit in fits.items() if fit]
    return matching[0] if len(matching) == 1 else None
