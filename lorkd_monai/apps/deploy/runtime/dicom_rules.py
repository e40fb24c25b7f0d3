"""Which expert reads which series: rules over DICOM tags, read from routing.yaml.

A series goes to the experts of the ONE rule that it matches. If it matches no rule, or several, the error states its
tags and the rules; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

__all__ = ["TAGS", "RoutingError", "Rule", "choose", "read_rules"]

TAGS = ("Modality", "BodyPartExamined", "SeriesDescription", "StudyDescription", "ProtocolName")
"""The DICOM keywords that a rule may use."""


class RoutingError(ValueError):
    """A rules file cannot be used, or a series matches no rule or several."""


@dataclass(frozen=True)
class Rule:
    """Experts, and patterns for each tag, of which one must match; a rule without patterns matches nothing."""

    experts: tuple[str, ...]
    match: Mapping[str, tuple[str, ...]]

    def matches(self, tags: Mapping[str, str]) -> bool:
        """True if every tag of the rule is there and fits one of its patterns, without regard to case and spaces."""
        return bool(self.match) and all(
            any(fnmatchcase(_plain(tags.get(tag)), _plain(pattern)) for pattern in patterns) and _plain(tags.get(tag))
            for tag, patterns in self.match.items()
        )

    def __str__(self) -> str:
        wanted = ", ".join(f"{tag} {' or '.join(patterns)}" for tag, patterns in self.match.items())
        return f"{' + '.join(self.experts)}: {wanted or 'nothing yet, its match is empty'}"


def _plain(text: Any) -> str:
    return " ".join(str(text or "").split()).casefold()


def _words(value: Any, where: str) -> tuple[str, ...]:
    words = value if isinstance(value, list) else [value]
    if not words or any(not isinstance(word, str) or not word.strip() for word in words):
        raise RoutingError(f"{where}: expected a text or a list of texts, got {value!r}; put quotes around it")
    return tuple(words)


def read_rules(path: str | Path, experts: Sequence[str]) -> list[Rule]:
    """Read routing.yaml; every rule must name experts of ``experts``.

    Raises:
        RoutingError: the file cannot be read, or holds anything but rules.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RoutingError(f"the rules {path} cannot be read: {error}") from error
    if not isinstance(content, dict) or set(content) != {"rules"} or not isinstance(content["rules"], list):
        raise RoutingError(f"{path}: expected one key, rules, with a list below it")
    rules = []
    for number, entry in enumerate(content["rules"], 1):
        where = f"{path}, rule {number}"
        if not isinstance(entry, dict) or "experts" not in entry or not set(entry) <= {"experts", "match"}:
            raise RoutingError(f"{where}: expected the keys experts and match, got {entry!r}")
        names = _words(entry["experts"], f"{where}, experts")
        unknown = [name for name in names if name not in experts]
        if unknown or len(set(names)) < len(names):
            raise RoutingError(f"{where}: expected each expert once, of {', '.join(experts)}, got {', '.join(names)}")
        match = entry.get("match") or {}
        if not isinstance(match, dict) or not set(match) <= set(TAGS):
            raise RoutingError(f"{where}, match: expected patterns for some of {', '.join(TAGS)}, got {match!r}")
        rules.append(Rule(names, {tag: _words(value, f"{where}, {tag}") for tag, value in match.items()}))
    if not rules:
        raise RoutingError(f"{path}: there is no rule in it")
    return rules


def choose(rules: Sequence[Rule], tags: Mapping[str, str], what: str) -> Rule | None:
    """Return the one rule that ``tags`` match, or None where there is none.

    Raises:
        RoutingError: more than one rule matches.
    """
    matching = [rule for rule in rules if rule.matches(tags)]
    if len(matching) > 1:
        listed = "\n".join(f"  {rule}" for rule in matching)
        raise RoutingError(
            f"{what} ({describe(tags)}) matches {len(matching)} rules of routing.yaml:\n{listed}\n"
            "Make them differ, for example by SeriesDescription, or name all their experts in one rule to run them all"
        )
    return matching[0] if matching else None


def describe(tags: Mapping[str, str]) -> str:
    """The first tags that rules use, in words."""
    return ", ".join(f"{tag} {tags[tag]!r}" if tags.get(tag) else f"no {tag}" for tag in TAGS[:3])


def no_rule(rules: Sequence[Rule], series: Sequence[tuple[str, Mapping[str, str]]]) -> RoutingError:
    """The error for a study without a matching series; ``series`` are names and tags."""
    seen = "\n".join(f"  {what}: {describe(tags)}" for what, tags in series)
    listed = "\n".join(f"  {rule}" for rule in rules)
    return RoutingError(f"no rule of routing.yaml matches any of:\n{seen}\nThe rules are:\n{listed}")
