"""Import of decompositions that the released code of the LoRKD papers trained.

Their state dicts keep, under wrappers (``CKN.module.resnet.…`` for classification, ``model.module.backbone.…`` for
segmentation), each adapted layer as ``….conv.weight`` beside ``….lora_A_list.<task>`` and ``….lora_B_list.<task>``, and
for classification one head for each task as ``head_task.<task>.module.weight``. For a kernel of k, A is rk × ik in 2D
and rk × ik² in 3D, B is ok × rk, and ΔW is scale · (B A) viewed as the weight: our layout ``"lorkd"``, so the factors
are copied as they are. None of their files holds the scale.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lorkd_monai.checkpoints.key_rules import KeyRules, by_structure
from lorkd_monai.errors import LoRKDError
from lorkd_monai.networks.eks.strategies import LayerOp
from lorkd_monai.networks.lorkd_net import LoRKDNet
from lorkd_monai.networks.low_rank import LowRankLayer
from lorkd_monai.networks.surgery import replace
from lorkd_monai.networks.surgery.heads import find_heads

__all__ = ["ImportReport", "import_authors"]

_FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<factor>[AB])_list\.(?P<task>\d+)")
_FIRST, _SECOND = "model.backbone.", "unet."  # the two names of the segmentation backbone
_HEAD = re.compile(r"head_task\.(?P<task>\d+)\.(?P<part>weight|bias)")


@dataclass
class ImportReport:
    """What became of the keys: each is in one of the first three lists."""

    placed: list[str] = field(default_factory=list)
    """Keys whose tensors are in the decomposition now."""
    dropped: list[str] = field(default_factory=list)
    """Keys that the caller asked to leave out."""
    unused: list[str] = field(default_factory=list)
    """Factors of grouped convolutions: the released code stores them, but its forward pass does not use them."""
    fresh: list[str] = field(default_factory=list)
    """Tensors of the decomposition that no key gave; the caller allowed them to start fresh."""

    def summary(self) -> str:
        """A line for each list but the first: the number of keys and examples."""
        lists = {
            "left out, as asked": self.dropped,
            "left out, factors of grouped convolutions that the released code never uses": self.unused,
            "starting fresh, to be trained": self.fresh,
        }
        return "\n".join(f"{what}: {len(keys)} ({some_of(keys)})" for what, keys in lists.items() if keys)


@dataclass
class _Source:
    shared: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, dict[tuple[str, int], Tensor]] = field(default_factory=dict)
    heads: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    names: dict[str, list[str]] = field(default_factory=dict)  # name without wrappers -> keys in the file

    def keys_of(self, *names: str) -> list[str]:
        return [key for name in names for key in self.names.get(name, [])]


def import_authors(
    state: Mapping[str, Tensor],
    backbone: nn.Module | Mapping,
    tasks: Sequence[str] | Mapping[str, int],
    *,
    alpha: float | None = None,
    scale: float | None = None,
    mapping: Mapping | None = None,
    drop: Sequence[str] = (),
    fresh: Sequence[str] = (),
    head: str | Sequence[str] | None = None,
    info: Mapping | None = None,
) -> tuple[LoRKDNet, ImportReport]:
    """Build the decomposition that a state dict of the released code holds.

    Layers are found by the mapping. Without one they are found by name, wrappers removed, or else by structure: both
    sides list their tensors in the same order and with the same shapes. The state dict also says which layers have
    experts, the ranks of the tasks, and where ranks are multiplied (the doubled rank of the segmentation decoder).

    Args:
        state: the state dict, as :func:`~lorkd_monai.checkpoints.weights.load_weights` gives it.
        backbone: the network without experts, or a MONAI config of it. A config is needed to export bundles.
        tasks: names of the tasks, in the order of their training; with the number of output channels of each where
            the state dict holds no heads.
        alpha: the ``lora_alpha`` of the training: ΔW is scaled by ``alpha / rank`` of each layer.
        scale: the scale itself, such as 2 for the imbalanced ranks. Give exactly one of ``alpha`` and ``scale``.
        mapping: ``{"keys": {key: key}, "rename": {regular expression: replacement}, "drop": […], "fresh": […]}``, see
            ``docs/import.md``.
        drop: regular expressions; keys in which one is found are left out.
        fresh: glob patterns of the backbone's keys that may keep the weights they start with.
        head: dotted name or names of the last layer, glob patterns allowed; None: found by itself.
        info: what the checkpoint says about the tasks, see ``network_info``.

    Returns:
        The decomposition in evaluation mode, and what became of every key.

    Raises:
        LoRKDError: a key without a place, a tensor of the backbone that no key gives, shapes that differ, ranks
            without a pattern. The message lists every such key.
    """
    if (alpha is None) == (scale is None):
        raise LoRKDError(
            "give either alpha (the lora_alpha of the training) or scale: no state dict holds it. The released "
            "classification code has alpha=16, the segmentation code with imbalanced ranks has scale=2"
        )
    rules = KeyRules.read(mapping, drop, fresh)
    source = _read(state, rules)
    if not source.factors:
        raise LoRKDError(
            "the state dict holds no experts: expected keys such as '….lora_A_list.0' and '….lora_B_list.0', got "
            f"{', '.join(list(state)[:3]) or 'none'}"
        )
    classes = _classes(source, tasks)
    plain, _ = replace.build_backbone(backbone, max(classes.values()))
    heads = _heads(plain, head)
    # Every key of the network outside its heads; several may name one tensor.
    inside = tuple(f"{h}." for h in heads)
    target = {k: v for k, v in plain.state_dict(keep_vars=True).items() if not k.startswith(inside)}
    if rules.keys or rules.rename:
        places = {name: rules.place(name) for name in source.shared}
    else:
        places = by_structure(source.shared, target)
    _check_places(source, places, target, plain, rules)
    layers, unused = _layers(source, places, plain, len(classes))
    ranks, pattern = _ranks(source, layers, plain, list(classes))
    net = LoRKDNet(
        backbone,
        classes,
        rank=ranks,
        alpha=16.0 if alpha is None else alpha,
        scale=scale,
        head=heads,
        include=list(layers.values()),
        rank_pattern=pattern,
        info=info,
    ).eval()
    report = ImportReport(dropped=source.dropped, unused=unused)
    _fill(net, source, places, layers, heads, rules, report)
    return net, report


def _read(state: Mapping[str, Tensor], rules: KeyRules) -> _Source:
    source = _Source()
    seen: dict[tuple, str] = {}
    tensors: dict[str, Tensor] = {}
    named: dict[str, str] = {}
    for key in state:
        name = ".".join(part for part in key.split(".") if part != "module")  # of DataParallel, at any depth
        if name in named:
            raise LoRKDError(f"{named[name]} and {key} differ only in 'module'")
        if rules.drops(key, name):
            source.dropped.append(key)
        else:
            named[name] = key
    # The wrappers hold the network twice, as model.backbone and as unet: in the same memory, or copied after a move.
    owner: dict[str, str] = {}
    for name, key in sorted(named.items(), key=lambda item: item[0].startswith(_SECOND)):  # stable sort
        tensor = state[key]
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape))
        twin = owner.get(_FIRST + name.removeprefix(_SECOND)) if name.startswith(_SECOND) else None
        if twin is None or not torch.equal(tensors[twin], tensor):
            twin = seen.setdefault(place, name) if tensor.numel() else name
        owner[name] = twin
        source.names.setdefault(twin, []).append(key)
        tensors.setdefault(twin, tensor)
    adapted = {match["layer"] for name in tensors if (match := _FACTOR.fullmatch(name))}
    for name, tensor in tensors.items():
        factor, head = _FACTOR.fullmatch(name), _HEAD.fullmatch(name)
        layer, _, part = name.rpartition(".")
        if factor:
            source.factors.setdefault(factor["layer"], {})[factor["factor"], int(factor["task"])] = tensor
        elif head:
            source.heads.setdefault(int(head["task"]), {})[head["part"]] = tensor
        elif layer.endswith(".conv") and layer[: -len(".conv")] in adapted:
            bare = f"{layer[: -len('.conv')]}.{part}"
            source.names[bare] = source.names.pop(name)
            source.shared[bare] = tensor
        else:
            source.shared[name] = tensor
    return source


def _classes(source: _Source, tasks: Sequence[str] | Mapping[str, int]) -> dict[str, int]:
    if isinstance(tasks, str) or not tasks:
        raise LoRKDError(f"tasks: expected the names of the tasks in the order of their training, got {tasks!r}")
    count = 1 + max(task for factors in source.factors.values() for _, task in factors)
    if len(tasks) != count or len(set(tasks)) != count:
        raise LoRKDError(f"tasks: the state dict has {count} experts, got {len(tasks)} names: {', '.join(tasks)}")
    if not source.heads:
        if not isinstance(tasks, Mapping):
            raise LoRKDError(
                "the state dict holds no heads (head_task.<task>.weight): give tasks as {name: number of output "
                "channels}, and name the head's keys in fresh: it starts fresh and must be trained"
            )
        return dict(tasks)
    if sorted(source.heads) != list(range(count)) or any("weight" not in h for h in source.heads.values()):
        raise LoRKDError(f"the state dict has heads for the tasks {sorted(source.heads)}, expected 0 to {count - 1}")
    classes = {name: source.heads[t]["weight"].shape[0] for t, name in enumerate(tasks)}
    if isinstance(tasks, Mapping) and dict(tasks) != classes:
        raise LoRKDError(f"tasks: the heads have the output channels {classes}, got {dict(tasks)}")
    return classes


def _heads(network: nn.Module, head: str | Sequence[str] | None) -> list[str]:
    if head is None and type(network).__module__.startswith("dynamic_network_architectures."):
        head = "decoder.seg_layers.*"  # one for each resolution, also where they are not used
    patterns = [] if head is None else [head] if isinstance(head, str) else list(head)
    names = [n for n, m in network.named_modules(remove_duplicate=False) if LayerOp.supports(m)]
    matched = [found for p in patterns for found in ([n for n in names if fnmatchcase(n, p)] or [p])]
    return find_heads(network, matched or None)


def _check_places(
    source: _Source, places: Mapping[str, str], target: Mapping[str, Tensor], network: nn.Module, rules: KeyRules
) -> None:
    problems, homeless = [], [n for n in source.shared if places.get(n) not in target]
    if homeless:
        groups = Counter(".".join(n.split(".")[:2]) for n in homeless)
        hint = ", ".join(repr(f"^{re.escape(g)}") for g in list(groups)[:6])
        listed = [
            k if places.get(n) in (None, n) else f"{k} → {places[n]}" for n in homeless for k in source.keys_of(n)
        ]
        problems.append(
            f"{_listed(listed)} found no place in {type(network).__name__}: name them in the mapping, or leave out "
            f"with drop=[{hint}]"
        )
    given: dict[int, str] = {}
    for name, tensor in source.shared.items():
        place = places.get(name)
        if place is None or place not in target:
            continue
        own = target[place]
        if own.shape != tensor.shape:
            problems.append(f"{name} is {tuple(tensor.shape)}, but {place} is {tuple(own.shape)}")
        other = given.setdefault(id(own), name)
        if other != name and not torch.equal(source.shared[other], tensor):
            problems.append(f"{other} and {name} both go to {place} and differ")
    open_keys, seen = [], set(given)
    for key, tensor in target.items():
        if id(tensor) not in seen and not rules.is_fresh(key) and not key.endswith("num_batches_tracked"):
            open_keys.append(key)
        seen.add(id(tensor))
    if open_keys:
        problems.append(
            f"no key gives {_listed(open_keys)} of {type(network).__name__}; name in fresh what may start fresh"
        )
    if problems:
        raise LoRKDError("the state dict does not fit the backbone, nothing was imported: " + "; ".join(problems))


def _listed(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    return f"{len(names)} keys ({some_of(names)})" if len(names) != 1 else names[0]


def some_of(names: Sequence[str], shown: int = 12) -> str:
    """Names in one line: all of a few, else the first of each branch of the network and how many there are."""
    if len(names) <= shown:
        return ", ".join(names)
    for depth in range(8, 0, -1):
        branches: dict[str, list[str]] = {}
        for name in names:
            branches.setdefault(".".join(name.split(".")[:depth]), []).append(name)
        if len(branches) <= shown // 2:
            break
    listed = [own[0] if len(own) == 1 else f"{own[0]} and {len(own) - 1} more of {b}" for b, own in branches.items()]
    more = len(listed) - shown // 2
    return ", ".join(listed[: shown // 2]) + (f", and {more} further branches" if more > 0 else "")


def _layers(
    source: _Source, places: Mapping[str, str], network: nn.Module, num_tasks: int
) -> tuple[dict[str, str], list[str]]:
    """Adapted layer -> its first name in the network; and the keys of factors that are not used."""
    first = {id(m): n for n, m in network.named_modules()}
    layers, unused = {}, []
    for layer, factors in source.factors.items():
        if f"{layer}.weight" not in source.shared:
            raise LoRKDError(f"{layer} has factors and no weight: expected the key {layer}.conv.weight")
        module = network.get_submodule(places[f"{layer}.weight"].rpartition(".")[0])
        wanted = {(f, t) for f in "AB" for t in range(num_tasks)}
        if factors.keys() != wanted:
            missing = sorted(f"{layer}.lora_{f}_list.{t}" for f, t in wanted - factors.keys())
            raise LoRKDError(f"the state dict lacks {_listed(missing)}")
        if getattr(module, "groups", 1) != 1:
            unused += source.keys_of(*(f"{layer}.lora_{f}_list.{t}" for f, t in factors))
            continue
        layers[layer] = first[id(module)]
    return layers, unused


def _ranks(
    source: _Source, layers: Mapping[str, str], network: nn.Module, tasks: Sequence[str]
) -> tuple[dict[str, int], dict[str, float]]:
    """The rank of each task, and patterns of the layers where the ranks are multiplied."""
    found: dict[str, list[int]] = {}
    for layer, name in layers.items():
        shape: Any = network.get_submodule(name).weight.shape
        blocks = shape[2] if len(shape) > 2 else 1
        for t in range(len(tasks)):
            a, b = source.factors[layer]["A", t], source.factors[layer]["B", t]
            rank = a.shape[0] // blocks
            columns = shape[1] * shape[2:].numel() // blocks
            wanted = (rank * blocks, columns), (shape[0] * blocks, rank * blocks)
            if rank < 1 or (tuple(a.shape), tuple(b.shape)) != wanted:
                raise LoRKDError(
                    f"{layer}: the factors of task {t} are {tuple(a.shape)} and {tuple(b.shape)}; expected "
                    f"(r·{blocks}) × {columns} and {shape[0] * blocks} × (r·{blocks}) for a weight {tuple(shape)}"
                )
            found.setdefault(name, []).append(rank)
    base = min(found.values())
    factors = {name: ranks[0] / base[0] for name, ranks in found.items()}
    for name, ranks in found.items():
        if any(round(b * factors[name]) != r for b, r in zip(base, ranks, strict=True)):
            raise LoRKDError(f"ranks of {name} are {ranks}: no common multiple of {base}, the lowest of any layer")
    return dict(zip(tasks, base, strict=True)), _compact(factors)


def _compact(factors: Mapping[str, float]) -> dict[str, float]:
    """One pattern for a whole branch of the network ("decoder.*") if all of its layers have the same factor."""
    pattern = {}
    for name, factor in factors.items():
        branch = name.partition(".")[0]
        whole = len({f for n, f in factors.items() if n.partition(".")[0] == branch}) == 1
        if factor != 1:
            pattern[f"{branch}.*" if whole and "." in name else name] = factor
    return pattern


@torch.no_grad()
def _fill(
    net: LoRKDNet,
    source: _Source,
    places: Mapping[str, str],
    layers: Mapping[str, str],
    heads: Sequence[str],
    rules: KeyRules,
    report: ImportReport,
) -> None:
    filled: set[int] = set()

    def put(tensor: Tensor, into: Tensor, name: str) -> None:
        if not torch.equal(tensor.to(into.dtype).to(tensor.dtype), tensor):
            raise LoRKDError(f"{name} holds {tensor.dtype} values that {into.dtype} can't hold exactly, or NaN")
        into.copy_(tensor)
        filled.add(id(into))
        report.placed += source.keys_of(name)

    for name, place in places.items():
        path, _, attribute = place.rpartition(".")
        module = net.backbone.get_submodule(path)
        module = module.layer if isinstance(module, LowRankLayer) else module
        put(source.shared[name], getattr(module, attribute), name)
    experts = net.expert_layers
    for layer, name in layers.items():
        for (factor, task), tensor in source.factors[layer].items():
            into = experts[name].lora_A if factor == "A" else experts[name].lora_B
            put(tensor, into[task], f"{layer}.lora_{factor}_list.{task}")
    if source.heads and len(heads) > 1:
        raise LoRKDError(f"the state dict has one head for each task, the backbone {len(heads)}: name one, head=…")
    for task, parts in source.heads.items():
        head: Any = net.get_submodule(f"backbone.{heads[0]}")
        own = dict(head.tasks[task].named_parameters())
        given, wanted = ({k: tuple(v.shape) for k, v in tensors.items()} for tensors in (parts, own))
        if given != wanted:
            raise LoRKDError(f"head_task.{task} has the shapes {given}, the head {heads[0]} has {wanted}")
        for part, tensor in parts.items():
            put(tensor, own[part], f"head_task.{task}.{part}")
    report.fresh = [name for name, tensor in net.backbone.named_parameters() if id(tensor) not in filled]
    lacking = [
        head
        for name in report.fresh
        for head in heads
        if name.startswith(f"{head}.") and not any(rules.is_fresh(k) for k in (head, f"{head}.weight", f"{head}.bias"))
    ]
    if lacking:
        raise LoRKDError(f"the state dict gives no head for {_listed(lacking)}: name it in fresh, and train it later")
