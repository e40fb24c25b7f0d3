"""Match the tensors of another code's state dict to a network: by the user's rules, by name, or by structure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor

from lorkd_monai.errors import LoRKDError

__all__ = ["KeyRules", "by_structure"]

_FIELDS = ("keys", "rename", "drop", "fresh")
_MODULE = re.compile(r"\bmodule\b")  # and not all_modules, a name of nnU-Net


@dataclass(frozen=True)
class KeyRules:
    """What the user says about the keys.

    Args:
        keys: name in the state dict -> key of the network.
        rename: regular expressions and their replacements, applied one after the other to all other names.
        drop: regular expressions; names in which one is found are left out. One that contains ``module`` is searched
            for in the key as it is in the file.
        fresh: glob patterns of the network's keys that may keep their initial weights.
    """

    keys: Mapping[str, str] = field(default_factory=dict)
    rename: Sequence[tuple[re.Pattern, str]] = ()
    drop: Sequence[re.Pattern] = ()
    fresh: Sequence[str] = ()

    @classmethod
    def read(cls, mapping: Mapping | None, drop: Sequence[str] = (), fresh: Sequence[str] = ()) -> KeyRules:
        """Check a mapping; ``drop`` and ``fresh`` are added to its own.

        Raises:
            LoRKDError: an unknown field, a value of the wrong type, or an invalid regular expression.
        """
        mapping = {} if mapping is None else mapping
        unknown = [k for k in mapping if k not in _FIELDS] if isinstance(mapping, Mapping) else [mapping]
        if unknown:
            raise LoRKDError(f"mapping: expected the fields {', '.join(_FIELDS)}, got {unknown[0]!r}")
        for name in ("keys", "rename"):
            value = mapping.get(name) or {}
            if not isinstance(value, Mapping) or not all(isinstance(v, str) for kv in value.items() for v in kv):
                raise LoRKDError(f"mapping: {name} must map strings to strings, got {value!r}")
        listed = {"drop": list(drop), "fresh": list(fresh)}
        for name, own in listed.items():
            value = mapping.get(name) or []
            if isinstance(value, str) or not all(isinstance(v, str) for v in [*value, *own]):
                raise LoRKDError(f"mapping: {name} must be a list of strings, got {value!r}")
            own += value
        return cls(
            keys=dict(mapping.get("keys") or {}),
            rename=[(_compiled(p), r) for p, r in (mapping.get("rename") or {}).items()],
            drop=[_compiled(p) for p in listed["drop"]],
            fresh=listed["fresh"],
        )

    def drops(self, key: str, name: str) -> bool:
        """Whether this key, or its name without ``module``, is to be left out."""
        return any(p.search(key if _MODULE.search(p.pattern) else name) for p in self.drop)

    def is_fresh(self, key: str) -> bool:
        """Whether this key of the network may keep its initial weights."""
        return any(fnmatchcase(key, p) for p in self.fresh)

    def place(self, name: str) -> str:
        """The key of the network where a tensor goes; the network may lack it.

        Raises:
            LoRKDError: a replacement that refers to a group that its expression lacks.
        """
        if name in self.keys:
            return self.keys[name]
        for pattern, replacement in self.rename:
            try:
                name = pattern.sub(replacement, name)
            except (re.error, IndexError) as e:
                raise LoRKDError(f"mapping: {pattern.pattern!r} → {replacement!r}: {e}") from e
        return name


def _compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as e:
        raise LoRKDError(f"mapping: {pattern!r} is not a regular expression: {e}") from e


def by_structure(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, str]:
    """Find each tensor's place by name, after removing one common prefix, else by shapes and order.

    Args:
        source: name -> tensor, each tensor once.
        target: key -> tensor of the network; of a tensor with several keys the first counts.

    Returns:
        Name -> key; names without a place are missing.

    Raises:
        LoRKDError: neither the names fit nor the shapes in order; the message says where the shapes first differ.
    """
    named = _by_name(source, target)
    if 2 * len(named) > len(source):
        return named
    first: dict[int, str] = {}
    for key, tensor in target.items():
        first.setdefault(id(tensor), key)
    names, keys = list(source), list(first.values())
    for name, key in zip(names, keys, strict=False):
        if source[name].shape != target[key].shape:
            raise LoRKDError(
                f"by structure, {name} {tuple(source[name].shape)} would go to {key} {tuple(target[key].shape)}: give "
                "a mapping, drop what does not belong to the backbone, or name another backbone"
            )
    # The caller decides about what is left over on either side.
    return dict(zip(names, keys, strict=False))


def _by_name(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, str]:
    votes: Counter[str] = Counter()
    for name in source:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in target:
                votes["".join(f"{p}." for p in parts[:i])] += 1
    if not votes:
        return {}
    wrapper = votes.most_common(1)[0][0]
    bare = {name: name[len(wrapper) :] for name in source if name.startswith(wrapper)}
    return {name: key for name, key in bare.items() if key in target and source[name].shape == target[key].shape}
