"""The form of a data list, in one place: `load_data_list` checks it, ``dataset.schema.json`` and docs/data.md show it.

A JSON schema cannot express all of it (that ids of classes have no gap, that low is below high): the rules refuse all
that the schema refuses, and may refuse more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorkd_monai.checks import TASK_NAME, is_real, is_whole

__all__ = ["ITEM_KEYS", "LIST_KEYS", "SPLITS", "TASK_KEYS", "Key", "class_ids", "faults", "json_schema"]

SPLITS = ("training", "validation", "test")

Rule = tuple[str, Callable[[Any], bool]]


@dataclass(frozen=True)
class Key:
    """One key of a list, of a task or of an item.

    ``text`` is for people, ``schema`` the JSON schema of the values. Each of ``rules`` is what a value must be, in
    words and as a function; the first that fails is reported. A key without rules is checked where it is used.
    """

    text: str
    schema: Mapping[str, Any]
    rules: tuple[Rule, ...] = ()
    needed: bool = False


def faults(content: Mapping[str, Any], keys: Mapping[str, Key]) -> list[str]:
    """Return what is wrong with the values of an object, one line for each key."""
    lines = []
    for name, key in keys.items():
        if name in content or key.needed:
            value = content.get(name)
            wrong = next((words for words, holds in key.rules if not holds(value)), None)
            lines += [] if wrong is None else [f"{wrong}, got {value!r}"]
    return lines


def class_ids(labels: object) -> bool:
    """Say whether the keys of ``labels`` are the ids "0" to "n-1" of two or more classes."""
    return isinstance(labels, dict) and len(labels) >= 2 and set(labels) == {str(n) for n in range(len(labels))}


def json_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 7, which editors know best) of a data list. Other keys are allowed."""
    items = {"type": "array", "items": {"$ref": "#/definitions/item"}}
    tasks = {
        "description": "Name of a task (it becomes a folder's name) → what is known of it.",
        "type": "object",
        "minProperties": 1,
        "propertyNames": {"pattern": f"^{TASK_NAME.pattern}$"},
        "additionalProperties": {"$ref": "#/definitions/task"},
    }
    schema = _object(LIST_KEYS)
    schema["properties"] |= {"tasks": tasks}
    schema["properties"] |= {split: {"description": f"The items of {split}.", **items} for split in SPLITS}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Data list of LoRKD for MONAI",
        **schema,
        "required": ["tasks"],
        "definitions": {"task": _object(TASK_KEYS), "item": _object(ITEM_KEYS)},
    }


def _object(keys: Mapping[str, Key]) -> dict[str, Any]:
    properties = {name: {"description": key.text.replace("`", ""), **key.schema} for name, key in keys.items()}
    return {"type": "object", "properties": properties, "required": [name for name, key in keys.items() if key.needed]}


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_names(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _are_numbers(value: object, *counts: int) -> bool:
    return isinstance(value, list) and len(value) in counts and all(map(is_real, value))


def _is_intensity(value: object) -> bool:
    if not isinstance(value, dict) or len(value) != 1:
        return False
    ((how, limits),) = value.items()
    if how not in ("range", "percentiles") or not _are_numbers(limits, 2) or limits[0] >= limits[1]:
        return False
    return how == "range" or (limits[0] >= 0 and limits[1] <= 100)


def _are_prompts(value: object) -> bool:
    if isinstance(value, dict):
        return all(re.fullmatch("[0-9]+", key) and is_whole(index, 1) for key, index in value.items())
    return is_whole(value, 1)


def _or_null(words: str, holds: Callable[[Any], bool]) -> tuple[Rule]:
    return ((words, lambda value: value is None or holds(value)),)


def _text_or_null(name: str, text: str) -> Key:
    rules = _or_null(f"{name!r} must be text", lambda value: isinstance(value, str))
    return Key(text, {"type": ["string", "null"]}, rules)


def _pair(**bounds: float) -> dict[str, Any]:
    return {"type": "array", "items": {"type": "number", **bounds}, "minItems": 2, "maxItems": 2}


_PATH = {"type": "string", "pattern": r"\S"}
_ONE_OF = {"minProperties": 1, "maxProperties": 1, "additionalProperties": False}


def _origin(of: str) -> dict[str, Key]:
    licence = _or_null("'licence' must be text", _is_text)
    authors = _or_null("'authors' must be a list of names", lambda v: _is_text(v) or _are_names(v))
    text = {"type": ["string", "null"], "pattern": r"\S"}
    names = {"type": "array", "minItems": 1, "items": {"type": "string", "pattern": r"\S"}}
    return {
        "licence": Key(f'licence of {of}, such as `"CC-BY-4.0"`', text, licence),
        "license": Key("the same as `licence`", text, licence),
        "authors": Key(
            f"names of those who made {of}; one may stand without a list", {"anyOf": [text, names]}, authors
        ),
    }


LIST_KEYS: Mapping[str, Key] = {
    "$schema": Key("where the schema of this form is, for editors", {}),
    "name": Key("shown in reports and READMEs", {}),
    "kind": Key(
        "optional: a list that is read as another kind is refused", {"enum": ["classification", "segmentation"]}
    ),
    "spatial_dims": Key("optional: 2 or 3; a list that is read with others is refused", {"enum": [2, 3]}),
    **_origin("all images, but those of tasks that say their own"),
}

TASK_KEYS: Mapping[str, Key] = {
    "labels": Key(
        'class numbers `"0"` to `"n-1"` and their names; for segmentation 0 is the background. A teacher\'s '
        "classes are found by these names",
        {
            "type": "object",
            "required": ["0", "1"],
            "propertyNames": {"pattern": "^(0|[1-9][0-9]*)$"},
            "additionalProperties": {"type": "string", "pattern": r"\S"},
        },
        (
            ('"labels" must name ids "0" to "n-1" of two or more classes, as {"0": "a", "1": "b"}', class_ids),
            (
                '"labels": each class needs a name that is printable text',
                lambda labels: all(_is_text(name) and name.isprintable() for name in labels.values()),
            ),
            ('"labels": two classes have the same name', lambda labels: len(set(labels.values())) == len(labels)),
        ),
        needed=True,
    ),
    "modality": _text_or_null(
        "modality", '`"CT"` decides the default window in 3D; the rest is text for the experts\' READMEs'
    ),
    "body_part": _text_or_null("body_part", "text"),
    "intensity": Key(
        '`{"range": [low, high]}` or `{"percentiles": [low, high]}`: what becomes 0 and 1; values beyond are clipped',
        {
            "type": ["object", "null"],
            "properties": {"range": _pair(), "percentiles": _pair(minimum=0, maximum=100)},
            **_ONE_OF,
        },
        _or_null(
            '"intensity" must be {"range": [low, high]} with low < high or {"percentiles": [low, high]} within 0..100',
            _is_intensity,
        ),
    ),
    "spacing": Key(
        "mm along the axes of RAS, 3D segmentation only: what volumes are resampled to. Default: the median of the "
        "training images",
        {"type": ["array", "null"], "items": {"type": "number", "exclusiveMinimum": 0}, "minItems": 2, "maxItems": 3},
        _or_null(
            "'spacing' must be a list of lengths in mm, each above 0", lambda v: _are_numbers(v, 2, 3) and min(v) > 0
        ),
    ),
    "channels": Key(
        "channels of the images; measured from the first one where it is left out",
        {"type": "integer", "minimum": 1},
        (("'channels' must be a whole number of at least 1", lambda v: is_whole(v, 1)),),
    ),
    "npz": Key("in place of items: a file in MedMNIST's form (classification), see below", _PATH),
    "vista3d_class": Key(
        'class numbers and their indices in VISTA3D, where that is the teacher: `{"1": 3}`; a number alone is that of '
        "class 1",
        {
            "anyOf": [
                {"type": ["integer", "null"], "minimum": 1},
                {
                    "type": "object",
                    "propertyNames": {"pattern": "^[0-9]+$"},
                    "additionalProperties": {"type": "integer", "minimum": 1},
                },
            ]
        },
        _or_null("vista3d_class must map class ids to VISTA3D's class indices, such as {'1': 3}", _are_prompts),
    ),
    "note": _text_or_null("note", 'text for people; see "Tasks without a score"'),
    "score": Key(
        "`false`: the task gets no score; `true`: it gets one whatever its note says",
        {"type": "boolean"},
        (("'score' must be true or false", lambda v: isinstance(v, bool)),),
    ),
    **_origin("this task's images, in place of the list's"),
}

ITEM_KEYS: Mapping[str, Key] = {
    "image": Key(
        "file of the image (in 3D also a folder with the slices of one DICOM series), or a list of files, one for each "
        "channel; relative to the list's folder",
        {"anyOf": [_PATH, {"type": "array", "minItems": 1, "items": _PATH}]},
        needed=True,
    ),
    "label": Key(
        "class number (classification) or the file of a mask (segmentation); null or -1: no label",
        {"anyOf": [{"type": "integer", "minimum": -1}, {"type": "null"}, _PATH]},
        needed=True,
    ),
    "task": Key("name of the task", {"type": "string"}, needed=True),
}
