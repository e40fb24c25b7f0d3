"""What the MONAI model zoo's CI asks of a bundle, and what our expert bundles promise beyond that.

One function a subject; each yields a `Problem` for each fault, with the file and what to do about it.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from lorkd_monai.bundle.check.problem import BundleFiles, Problem
from lorkd_monai.bundle.check.weights import check_weights, check_zoo_commands
from lorkd_monai.bundle.inert import is_inert
from lorkd_monai.bundle.metadata import NO_AUTHORS, needed_packages, strings_of
from lorkd_monai.bundle.readme import NO_LICENSE, SECTIONS
from lorkd_monai.checks import is_bundle_name
from lorkd_monai.errors import LoRKDError, first_line
from lorkd_monai.files import read_json

__all__ = ["Problem", "check_bundle", "check_origin"]

REQUIRED_FILES = (
    "LICENSE",
    "configs/metadata.json",
    "configs/inference.json",
    "configs/logging.conf",
    "models/model.pt",
    "docs/README.md",
    "docs/data_license.txt",
)
_METADATA_TEXT = ("schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description",
                  "authors", "copyright")  # fmt: skip
_TENSOR = ("type", "format", "num_channels", "spatial_shape", "dtype", "value_range", "is_patch_data", "channel_def")
_TEXT_SUFFIXES = (".json", ".yaml", ".yml", ".md", ".txt", ".conf", ".py", ".csv")
_PERSONAL = re.compile(
    r"(?<![\w.])(?:/(?:home|Users|root|workspace|work|mnt|media|tmp)/[^\s\"'`,;)]+|[A-Za-z]:\\{1,2}Users\\[^\s\"']+)"
)
_EXACT = re.compile(r"\d+(\.\d+)+((a|b|rc|\.post|\.dev)\d+)*")
_LARGE = 25 * 2**20


def _files(bundle: BundleFiles) -> Iterator[Problem]:
    for name in REQUIRED_FILES:
        if not (bundle.folder / name).is_file():
            yield Problem("missing-file", name, "the file is missing", "export the bundle again, or put the file back")
    for path in sorted((bundle.folder / "configs").glob("*.json")):
        name = path.relative_to(bundle.folder).as_posix()
        try:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text)
        except ValueError as error:
            yield Problem("bad-json", name, f"it is no JSON ({error})", "fix it, or export the bundle again")
            continue
        if not isinstance(content, dict):
            yield Problem("bad-json", name, f"expected an object, got {type(content).__name__}", "export it again")
            continue
        bundle.json[name] = content
        forms = {json.dumps(content, indent=4, ensure_ascii=ascii_only) for ascii_only in (False, True)}
        if text.strip() not in forms:
            yield Problem("indent", name, "JSON must be indented by 4", "write it with json.dump(…, indent=4)")


def _names(bundle: BundleFiles) -> Iterator[Problem]:
    if not is_bundle_name(bundle.name):
        yield Problem(
            "name", ".", f"the folder is named {bundle.name!r}, expected <task>_classification or <task>_segmentation",
            "rename the folder: MONAI Label reads the kind of work from it",
        )  # fmt: skip
    display = bundle.metadata.get("name")
    if bundle.metadata and not (isinstance(display, str) and display.strip()):
        yield Problem("name", "configs/metadata.json", "'name' must hold a display name", "add one in plain words")


def _metadata(bundle: BundleFiles) -> Iterator[Problem]:
    file, metadata = "configs/metadata.json", bundle.metadata
    if not metadata:
        return
    for key in _METADATA_TEXT:
        if not isinstance(metadata.get(key), str) or not metadata[key].strip():
            yield Problem("schema", file, f"{key!r} must be a text, got {metadata.get(key)!r}", "fill it in")
    for key in ("changelog", "required_packages_version", "supported_apps", "network_data_format"):
        if not isinstance(metadata.get(key), dict):
            yield Problem("schema", file, f"{key!r} must be an object, got {metadata.get(key)!r}", "fill it in")
    if isinstance(metadata.get("changelog"), dict) and str(metadata.get("version")) not in metadata["changelog"]:
        yield Problem(
            "changelog", file, f"version {metadata.get('version')!r} is not in 'changelog'", "add a line for it"
        )
    for side, name in (("inputs", "image"), ("outputs", "pred")):
        tensor = bundle.tensor(side, name)
        where = f"network_data_format#{side}#{name}"
        missing = [key for key in _TENSOR if key not in tensor]
        if missing:
            yield Problem("schema", file, f"{where} lacks {', '.join(missing)}", "describe the tensor completely")
            continue
        shape = tensor["spatial_shape"]
        sizes = isinstance(shape, list) and all(isinstance(n, int) and n > 0 for n in shape)
        if not sizes or (side == "inputs" and not shape):
            yield Problem("schema", file, f"{where}: spatial_shape is {shape!r}", "give the sizes in voxels as a list")
        channels = tensor["channel_def"] if isinstance(tensor["channel_def"], Mapping) else {}
        if list(channels) != [str(i) for i in range(len(channels))] or tensor["num_channels"] != len(channels):
            yield Problem(
                "channels", file, f"{where}: num_channels is {tensor['num_channels']} but channel_def names the "
                f"channels {list(channels)}", "make them agree: one name per channel, keys '0', '1', …",
            )  # fmt: skip
    live = [text for text in strings_of(metadata) if not is_inert(text)]
    if live:
        yield Problem(
            "expression", file, f"MONAI would evaluate or replace the text {live[0]!r}", "put a space in front of it"
        )


def _schema(bundle: BundleFiles, schema: str | Path | None) -> Iterator[Problem]:
    if schema is None or not bundle.metadata:
        return
    try:
        import jsonschema
    except ImportError:
        raise LoRKDError(
            "checking against a schema file needs the package jsonschema: pip install 'lorkd-monai[schema]'"
        ) from None
    rules = read_json(schema, "expected a copy of MONAI's metadata schema")
    if "properties" not in rules:
        raise LoRKDError(f"{schema} is no JSON schema: it has no 'properties'")
    for error in jsonschema.validators.validator_for(rules)(rules).iter_errors(bundle.metadata):
        where = "#".join(map(str, error.absolute_path)) or "the file"
        yield Problem("schema", "configs/metadata.json", f"{where}: {error.message[:200]}", "do as the schema says")


def _packages(bundle: BundleFiles) -> Iterator[Problem]:
    file, stated = "configs/metadata.json", bundle.metadata.get("required_packages_version")
    if not isinstance(stated, dict):
        return
    versions = {key: bundle.metadata.get(key) for key in ("monai_version", "pytorch_version", "numpy_version")} | stated
    for package, version in versions.items():
        if not isinstance(version, str) or not _EXACT.fullmatch(version):
            yield Problem("unpinned", file, f"{package} has the version {version!r}", "name one exact version")
    shape = bundle.tensor("inputs", "image").get("spatial_shape")
    dims = len(shape) if isinstance(shape, list) and shape else None
    for package in needed_packages(*bundle.json.values(), spatial_dims=dims):
        if package not in stated:
            yield Problem(
                "unlisted-package", file, f"the configs need {package}, which required_packages_version does not name",
                "add it with its exact version",
            )  # fmt: skip


def _stock_only(bundle: BundleFiles) -> Iterator[Problem]:
    for name, content in bundle.json.items():
        for text in strings_of(content):
            if re.search(r"\b(lorkd_monai|scripts)\.", text) and name != "configs/metadata.json":
                yield Problem(
                    "not-stock", name, f"it refers to {text!r}, which is not there where only MONAI is installed",
                    "use classes of MONAI and torch",
                )  # fmt: skip


def _personal_paths(bundle: BundleFiles) -> Iterator[Problem]:
    for path in sorted(bundle.folder.rglob("*")):
        if not path.is_file() or path.suffix.lower() not in _TEXT_SUFFIXES:
            continue
        found = _PERSONAL.search(path.read_text(encoding="utf-8", errors="replace"))
        if found:
            name = path.relative_to(bundle.folder).as_posix()
            yield Problem("personal-path", name, f"it holds the path {found[0]!r}", "write it relative to @bundle_root")


def _large_files(bundle: BundleFiles) -> tuple[dict[str, Mapping[str, Any]], list[Problem]]:
    """The entries of large_files.yml by their path, and what is wrong with the file."""
    import yaml

    entries: dict[str, Mapping[str, Any]] = {}
    problems = []
    for path in sorted(bundle.folder.glob("large_files.y*ml")):
        fix = "write a list large_files of entries with path, url, hash_val and hash_type"
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))["large_files"]
            entries.update({str(entry["path"]): entry for entry in found})
        except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError) as error:
            problems.append(Problem("large-file", path.name, f"it cannot be read ({error!r:.200})", fix))
    return entries, problems


def _sizes(bundle: BundleFiles) -> Iterator[Problem]:
    listed, problems = _large_files(bundle)
    yield from problems
    for path in sorted(bundle.folder.rglob("*")):
        if not path.is_file() or path.stat().st_size <= _LARGE:
            continue
        name = path.relative_to(bundle.folder).as_posix()
        if name not in listed:
            yield Problem("large-file", name, "it is above 25 MB", "list it in large_files.yml with its sha256")
        elif listed[name].get("hash_val") != sha256(path.read_bytes()).hexdigest():
            yield Problem("large-file", name, "large_files.yml has another hash for it", "write its sha256 there")


def _addresses(bundle: BundleFiles) -> Iterator[Problem]:
    """The zoo holds no file above 25 MB: it downloads them from where large_files.yml says."""
    for name, entry in _large_files(bundle)[0].items():
        url = entry.get("url")
        if not re.fullmatch(r"https?://[^\s/]+/\S+", str(url)):
            yield Problem(
                "large-file-url", "large_files.yml", f"{name} has no address to be downloaded from, but {url!r}",
                "upload the file to where anybody can get it, and write its https:// address there",
            )  # fmt: skip


def _pages(bundle: BundleFiles) -> Iterator[Problem]:
    readme = bundle.folder / "docs" / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8", errors="replace")
        heads = re.findall(r"^#{2,4} +\**(.+?)\** *$", text, flags=re.MULTILINE)
        for section in SECTIONS:
            if section not in heads:
                yield Problem("readme", "docs/README.md", f"the section {section!r} is missing", "add it")
        if "not for clinical use" not in text.lower():
            yield Problem("readme", "docs/README.md", "it does not say 'not for clinical use'", "say so in Limitations")
    licence = bundle.folder / "LICENSE"
    if licence.is_file() and "Apache License" not in licence.read_text(encoding="utf-8", errors="replace"):
        yield Problem("licence", "LICENSE", "it is not the Apache License 2.0", "put that text there")
    data = bundle.folder / "docs" / "data_license.txt"
    if data.is_file() and not data.read_text(encoding="utf-8", errors="replace").strip():
        yield Problem("licence", "docs/data_license.txt", "it is empty", "say what is known of the data's licence")


def check_origin(folder: str | Path) -> list[Problem]:
    """What a bundle does not say of its data and authors; it runs all the same, so that `check_bundle` lets it pass.

    Example::

        for warning in check_origin("experts/breast_classification"):
            print(warning)
    """
    folder, found = Path(folder), []
    licence, metadata = folder / "docs" / "data_license.txt", folder / "configs" / "metadata.json"
    if licence.is_file() and NO_LICENSE in licence.read_text(encoding="utf-8", errors="replace"):
        found.append(
            Problem(
                "no-licence", "docs/data_license.txt", "it names no licence of the data",
                "give the data list 'licence' and export the bundle again, or write it there",
            )
        )  # fmt: skip
    nobody = NO_AUTHORS.rsplit(" ", 1)[0]  # of any version
    if metadata.is_file() and f'"authors": "{nobody}' in metadata.read_text(encoding="utf-8", errors="replace"):
        found.append(
            Problem(
                "no-authors", "configs/metadata.json", "it names no authors",
                "give the data list 'authors' and export the bundle again, or write them there",
            )
        )  # fmt: skip
    return found


def _has(config: Any, key: str) -> bool:
    for part in key.split("#"):
        if not isinstance(config, Mapping) or part not in config:
            return False
        config = config[part]
    return True


def _properties(bundle: BundleFiles) -> Iterator[Problem]:
    from monai.bundle import ConfigWorkflow

    meta = bundle.folder / "configs" / "metadata.json"
    for name, workflow_type in (("inference", "infer"), ("train", "train")):
        path = bundle.folder / "configs" / f"{name}.json"
        if f"configs/{name}.json" not in bundle.json or not bundle.metadata:
            continue
        # The properties are instantiated: an item that is never loaded stands for the data, and `initialize`, which
        # may change the state of this process, is left out.
        content, items = bundle.json[f"configs/{name}.json"], [{"image": "", "label": 0}]
        sections = ["dataset"] if name == "inference" else ["train#dataset", "validate#dataset"]
        data: dict[str, Any] = {f"{key}#data": items for key in sections if _has(content, key)}
        try:
            # A handler may make its folder below the root: the working directory is not the place for it.
            with tempfile.TemporaryDirectory() as root:
                workflow = ConfigWorkflow(
                    str(path), str(meta), False, "_none_", workflow_type=workflow_type, bundle_root=root, **data
                )
                workflow.initialize()
                missing = workflow.check_properties() or []
        except (Exception, SystemExit) as error:  # a config may raise anything
            reason = first_line(error)
            yield Problem("property", f"configs/{name}.json", f"it cannot be built ({reason})", "fix the config")
            continue
        for item in missing:
            yield Problem("property", f"configs/{name}.json", f"the required property {item!r} is missing", "add it")
    inference = bundle.inference
    for key in ("preprocessing", "postprocessing", "inferer", "device"):
        if inference and key not in inference:
            yield Problem("property", "configs/inference.json", f"MONAI Label and Deploy need {key!r}", "add it")
    train = bundle.json.get("configs/train.json")
    if train is not None:
        section = train.get("train")
        handlers = section.get("handlers") if isinstance(section, Mapping) else None
        if "network" not in train or not isinstance(handlers, list) or not all(isinstance(h, dict) for h in handlers):
            yield Problem(
                "property", "configs/train.json", "MONAI Label needs 'network' and a literal list train#handlers",
                "write the handlers out",
            )  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """MONAI's commands log and warn about every step; only what we return counts here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def check_bundle(
    folder: str | Path,
    *,
    name: str | None = None,
    thorough: bool = True,
    schema: str | Path | None = None,
    for_zoo: bool = True,
) -> list[Problem]:
    """Check an expert bundle as the model zoo's CI does and return its problems; an empty list means none.

    Files, names, sizes, JSON, metadata, exact versions of all packages that the configs need, personal paths, README
    sections, licences, required properties, weights that fit the network, and every format's output.
    The network is built from the bundle's own config: check only bundles that you would also run.

    Args:
        name: the name to judge instead of the folder's own.
        thorough: also run MONAI's own `verify_net_in_out` and `ckpt_export`.
        schema: file of MONAI's metadata schema, to validate against as well (needs ``lorkd-monai[schema]``).
        for_zoo: also ask for what nobody but the model zoo needs: the addresses of large files.

    Raises:
        LoRKDError: ``folder`` is no folder.

    Example::

        for problem in check_bundle("experts/breast_classification"):
            print(problem)
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LoRKDError(f"expected the folder of a bundle, got {str(folder)!r}, which is no folder")
    bundle = BundleFiles(folder, name or folder.resolve().name)
    subjects: list[Callable[[BundleFiles], Iterator[Problem]]] = [
        _files, _names, _metadata, _packages, _stock_only, _personal_paths, _sizes, _pages, _properties, check_weights,
    ]  # fmt: skip
    with _quiet():
        problems = [problem for subject in subjects for problem in subject(bundle)]
        problems += _schema(bundle, schema)
        problems += _addresses(bundle) if for_zoo else []
        if thorough and not problems:
            problems += check_zoo_commands(bundle)
    return problems
