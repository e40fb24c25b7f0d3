"""What a builder of lists left out."""

from __future__ import annotations

import logging
from pathlib import Path

__all__ = ["Skipped"]

_log = logging.getLogger(__name__)
_EXAMPLES = 3


class Skipped:
    """What a builder of lists left out: paths by the reason."""

    def __init__(self) -> None:
        self.paths: dict[str, list[str]] = {}

    def add(self, reason: str, path: str | Path) -> None:
        """Note one file or folder."""
        self.paths.setdefault(reason, []).append(str(path))

    def tell(self) -> None:
        """Log one line for each reason, with a count and examples; once."""
        for reason, paths in self.paths.items():
            more = ", …" if len(paths) > _EXAMPLES else ""
            _log.warning("skipped %d: %s (%s%s)", len(paths), reason, ", ".join(paths[:_EXAMPLES]), more)
        self.paths.clear()
