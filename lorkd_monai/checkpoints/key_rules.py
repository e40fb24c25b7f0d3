"""Which tensor of a foreign state dict belongs where: by the user's rules, by name, or by structure."""

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
        rename: regular expressions and their replacements, applied one after the other to every other name.
        drop: regular expressions; names in which one is found are left out. One that speaks of ``module`` itself is
            looked for in the key as it is in the file.
        fresh: glob patterns of the network's keys that may keep the weights they start with.
    """

    keys: Mapping[str, str] = field(default_factory=dict)
    rename: Sequence[tuple[re.Pattern, str]] = ()
    drop: Sequence[re.Pattern] = ()
    fresh: Sequence[str] = ()

    @classmethod
    def read(cls, mapping: Mapping | None, drop: Sequence[str] = (), fresh: Sequence[str] = ()) -> KeyRules:
        """Check a mapping, with further ``drop`` and ``fresh`` beside its own.

        Raises:
            LoRKDError: an unknown field, a value of another type, or no regular expression.
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

    @property
    def place_keys(self) -> bool:
        """Whether the rules say where keys go, so that structure is not asked."""
        return bool(self.keys or self.rename)

    def drops(self, key: str, name: str) -> bool:
        """Whether this key, or its name without ``module``, is to be left out."""
        return any(p.search(key if _MODULE.search(p.pattern) else name) for p in self.drop)

    def is_fresh(self, key: str) -> bool:
        """Whether this key of the network may keep the weights it starts with."""
        return any(fnmatchcase(key, p) for p in self.fresh)

    def places(self, names: Sequence[str] | Mapping[str, Tensor]) -> dict[str, str]:
        """Name -> key of the network, as the rules say; whether there is such a key is not asked.

        Raises:
            LoRKDError: a replacement that refers to a group which its expression lacks.
        """
        places = {}
        for name in names:
            place = self.keys.get(name)
            if place is None:
                place = name
                for pattern, replacement in self.rename:
                    try:
                        place = pattern.sub(replacement, place)
                    except (re.error, IndexError) as e:
                        raise LoRKDError(f"mapping: {pattern.pattern!r} → {replacement!r}: {e}") from e
            places[name] = place
        return places


def _compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as e:
        raise LoRKDError(f"mapping: {pattern!r} is no regular expression: {e}") from e


def by_structure(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, str]:
    """Find each tensor's place by its name behind one common wrapper, else by shapes and order.

    Args:
        source: name -> tensor, each tensor once.
        target: key -> tensor of the network; a tensor that has several keys counts once, with its first.

    Returns:
        Name -> key; names without a place are missing.

    Raises:
        LoRKDError: names don't fit, and the shapes in order neither; the message says where they part.
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
                "a mapping, leave out with drop what is not of the backbone, or name another backbone"
            )
    # What is left over on either side is for the caller to refuse or allow.
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
