"""What a bundle is called with, checked before anything is read: MONAI takes any key, also one that nothing reads."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow, ReferenceResolver
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS, ID_SEP_KEY

from lorkd_monai.checks import as_path
from lorkd_monai.errors import LoRKDError

__all__ = ["check_overrides"]

_PATHS = (
    "bundle_root", "dataset_dir", "output_dir", "teacher_bundle", "cache_dir", "trained", "checkpoint",
    "predictions_dir",
)  # fmt: skip


def check_overrides() -> None:
    """Refuse keys that nothing in the running bundle reads, and paths that are none; for a config's ``initialize``.

    A key is fine where the bundle's own config files have it, where an expression refers to it, where it is an argument
    of a component (``train#trainer#amp``), or where MONAI itself asks for it. Outside a `ConfigWorkflow` nothing is
    checked.

    Raises:
        LoRKDError: naming each unknown key with the nearest one that is known, or a number in place of a path.

    In a config::

        initialize:
        - $bundle.check_overrides()
    """
    workflow = _running()
    if workflow is None:
        return
    parser = workflow.parser
    for name in _PATHS:
        if parser.get(name) is not None:
            as_path(parser[name], f"--{name}")
    config = {key: value for key, value in parser.get().items() if key != parser.meta_key}
    own = _own_ids(workflow)
    asked = {workflow.run_id, workflow.init_id, workflow.final_id}
    asked |= {entry["id"] for entry in (workflow.properties or {}).values() if "id" in entry}
    asked |= {key for settings in DEFAULT_EXP_MGMT_SETTINGS.values() for key in settings["configs"]}
    known = own | {ReferenceResolver.normalize_id(key) for key in asked}
    referred = set(_references(config))
    unknown = [id for id in _ids(config) if id not in known and not _is_referred(id, referred)]
    # What is below an unknown key goes with it.
    unknown = [id for id in unknown if not any(id.startswith(other + ID_SEP_KEY) for other in unknown)]
    if unknown:
        raise LoRKDError(
            f"nothing in this bundle reads {' and '.join(_told(id, own) for id in unknown)}. docs/README.md of the "
            "bundle lists the keys"
        )


def _running() -> ConfigWorkflow | None:
    """The workflow that evaluates the expression that called; MONAI hands expressions neither it nor its parser."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), ConfigWorkflow):
            return frame.f_locals["self"]
        frame = frame.f_back
    return None


def _own_ids(workflow: ConfigWorkflow) -> set[str]:
    """The ids in those config files of the bundle that the workflow was made of."""
    found: set[str] = set()
    for file in workflow.config_root_path.iterdir():
        if file.suffix not in (".json", ".yaml", ".yml") or file.name == "metadata.json":
            continue
        content = ConfigParser.load_config_file(file)
        content = {ReferenceResolver.normalize_id(key.removeprefix("+")): value for key, value in content.items()}
        if all(key in workflow.parser for key in content):
            found |= set(_ids(content))
    return found


def _ids(config: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The ids of a config and of its sections; what a component holds are its arguments."""
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, dict) and "_target_" not in value:
            yield from _ids(value, f"{prefix}{key}{ID_SEP_KEY}")


def _references(config: Any) -> Iterator[str]:
    if isinstance(config, str):
        yield from ReferenceResolver.match_refs_pattern(config)
    elif isinstance(config, (dict, list)):
        for value in config.values() if isinstance(config, dict) else config:
            yield from _references(value)


def _is_referred(id: str, referred: set[str]) -> bool:
    """Whether something refers to an id, to a part of it, or to a section that holds it."""
    return any(
        other == id or other.startswith(id + ID_SEP_KEY) or id.startswith(other + ID_SEP_KEY) for other in referred
    )


def _told(id: str, own: set[str]) -> str:
    """An unknown id as it is typed, and the nearest one that is known: of the same name's last part first."""
    leaves: dict[str, str] = {}
    for known in sorted(own, key=lambda known: -known.count(ID_SEP_KEY)):
        leaves[known.split(ID_SEP_KEY)[-1]] = known
    near = difflib.get_close_matches(id, own, 1, 0.85) or [
        leaves[leaf] for leaf in difflib.get_close_matches(id.split(ID_SEP_KEY)[-1], leaves, 1)
    ]
    typed, nearest = (one.replace(ID_SEP_KEY, "#") for one in (id, *(near or [""])))
    return f"--{typed}" + (f" (did you mean --{nearest}?)" if nearest else "")
