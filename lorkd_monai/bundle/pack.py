"""Sharing expert bundles: one zip file, a network ready to run, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import re
import shutil
import tempfile
import zipfile
from importlib import util
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import nn

from lorkd_monai.bundle.check.checker import check_bundle
from lorkd_monai.bundle.formats import build_network
from lorkd_monai.errors import LoRKDError, first_line
from lorkd_monai.files import atomic_file

__all__ = ["load_expert", "pack_bundle", "push_bundle"]

# What running and training leave in a bundle's folder, and what is no part of what is shared.
_LEFT_OUT = ("eval", "data", "__pycache__")


def _shared_files(folder: Path) -> list[Path]:
    """The files of a bundle, sorted; no hidden ones, no results, no links."""
    files = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if path.is_file() and not path.is_symlink() and not hidden and parts[0] not in _LEFT_OUT:
            files.append(path)
    return files


def _checked(folder: str | Path, check: bool) -> Path:
    folder = Path(folder).resolve()
    if not (folder / "configs" / "metadata.json").is_file():
        raise LoRKDError(f"expected the folder of a MONAI bundle, but {folder} has no configs/metadata.json")
    problems = check_bundle(folder, thorough=False, for_zoo=False) if check else []
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise LoRKDError(f"{folder.name} is not fit to be shared; fix this first:\n{listed}")
    return folder


def pack_bundle(
    folder: str | Path, out_zip: str | Path | None = None, *, overwrite: bool = False, check: bool = True
) -> Path:
    """Write a bundle as a zip file with ``NAME/`` at its root and return the file's path.

    ``python -m monai.bundle download --name NAME --url file:///…/NAME.zip --bundle_dir DIR`` unpacks it. The same
    bundle gives the same bytes; results (``eval``), data and hidden files stay out.

    Args:
        out_zip: a file, or a folder to put NAME.zip into; None puts it next to the bundle.
        overwrite: replace an existing file.
        check: refuse a bundle with problems, see `check_bundle`.

    Raises:
        LoRKDError: no bundle, one with problems, or an existing file.
    """
    folder = _checked(folder, check)
    target = Path(out_zip) if out_zip is not None else folder.parent
    target = (target if target.suffix == ".zip" else target / f"{folder.name}.zip").absolute()
    if target.exists() and not overwrite:
        raise LoRKDError(f"{target} exists already: delete it, name another file, or set overwrite=True (--overwrite)")
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in _shared_files(folder):
            entry = zipfile.ZipInfo(f"{folder.name}/{path.relative_to(folder).as_posix()}", (1980, 1, 1, 0, 0, 0))
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            with path.open("rb") as source, archive.open(entry, "w", force_zip64=True) as sink:
                shutil.copyfileobj(source, sink, 2**20)
    return target


def load_expert(folder: str | Path) -> nn.Module:
    """Return the network of an expert bundle with its weights, on the CPU and in eval mode.

    It is built from ``network_def`` of the bundle's own configs/inference.json: load only bundles that you would also
    run. The weights are read with ``weights_only=True``.

    Raises:
        LoRKDError: no bundle, or weights that do not fit.
    """
    folder = Path(folder)
    config, weights = folder / "configs" / "inference.json", folder / "models" / "model.pt"
    for path in (config, weights):
        if not path.is_file():
            raise LoRKDError(f"expected the folder of an expert bundle, but {path} is missing")
    definition = ConfigParser.load_config_file(config).get("network_def")
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its first wrong byte leads to
        raise LoRKDError(f"{weights} is no state_dict that can be read safely: {error}") from error
    return build_network(definition, state)


def push_bundle(
    folder: str | Path,
    repo: str,
    *,
    token: str | None = None,
    private: bool = True,
    version: str | None = None,
    check: bool = True,
) -> Any:
    """Push a bundle to ``repo`` (``"user/name"``) on the Hugging Face Hub and return what the Hub answers.

    MONAI's `push_to_hf_hub` does it, on a copy: it writes a model card into the folder that it pushes.

    Raises:
        LoRKDError: no bundle, one with problems, a name that is none, the package huggingface_hub is missing, or the
            Hub does not take it.
    """
    if not isinstance(repo, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo, re.ASCII):
        raise LoRKDError(f"repo: expected the name of a repository on the Hub, user/name, got {repo!r}")
    if util.find_spec("huggingface_hub") is None:
        raise LoRKDError("pushing to the Hugging Face Hub needs one more package: pip install huggingface_hub")
    from monai.bundle import push_to_hf_hub

    folder = _checked(folder, check)
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / folder.name
        for path in _shared_files(folder):
            target = copy / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
        try:
            return push_to_hf_hub(
                repo=repo, name=folder.name, bundle_dir=temporary, token=token, private=private, version=version
            )
        except Exception as error:  # no network, no login, no such user: the Hub's errors have no common class
            reason = first_line(error)
            raise LoRKDError(
                f"the Hugging Face Hub did not take {folder.name} into {repo}: {reason}; log in with `hf auth login` "
                "or give a token that may write there, and check the network"
            ) from error
