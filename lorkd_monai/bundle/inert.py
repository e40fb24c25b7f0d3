"""Text that came from a data list, made safe for a config, a Markdown page or a file name."""

from __future__ import annotations

import re
from typing import Any

from lorkd_monai.checks import is_file_name
from lorkd_monai.errors import LoRKDError

__all__ = ["check_task_name", "inert_text", "is_inert", "markdown_text"]

_RELATIVE = re.compile(r"([@%])(?=#|::)")
_REFERENCE = re.compile(r"@\w*(?:(?:#|::)\w*)*")


def check_task_name(name: Any) -> str:
    """Return ``name`` if it can be part of a folder name.

    Raises:
        LoRKDError: it holds anything but letters, digits, ``_`` and ``-`` (ASCII).
    """
    if is_file_name(name):
        return name
    raise LoRKDError(
        f"a task name becomes the name of its bundle's folder: expected letters, digits, '_' and '-' only, got "
        f"{name!r}; rename the task in the data list"
    )


def is_inert(text: str) -> bool:
    """True if MONAI's config parser takes ``text`` as it is: no expression, macro or reference in it."""
    return not (text.startswith(("$", "%")) or _REFERENCE.fullmatch(text) or _RELATIVE.search(text))


def inert_text(text: Any) -> str:
    """Return ``text`` as one line that MONAI's config parser can only take as data.

    The parser evaluates what begins with ``$``, replaces what begins with ``%`` or is an ``@id`` as a whole, and
    resolves ``@#`` and ``%#`` anywhere. Such text gets a space in front of it, or inside ``@#``: a reader sees
    the same words, and ``strip()`` gives a leading sign back. All other text is kept as it is.

    Example::

        >>> inert_text("$(rm -rf)"), inert_text("100% stenosis"), inert_text("DR grade 0")
        (' $(rm -rf)', '100% stenosis', 'DR grade 0')
    """
    line = " ".join(str(text).split())
    line = _RELATIVE.sub(r"\1 ", line)
    return line if is_inert(line) else f" {line}"


def markdown_text(text: Any) -> str:
    """Return ``text`` as one line that Markdown shows as it is, also inside a table."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*{}\[\]<>|$~]|(?<!\w)_|_(?!\w))", r"\\\1", line)
