"""What the package logs, printed for whoever sits at the command line."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

__all__ = ["printed_log"]


@contextlib.contextmanager
def printed_log(name: str) -> Iterator[None]:
    """Print what the logger ``name`` and those below it say in the block, from INFO on, without time and level."""
    logger, handler = logging.getLogger(name), logging.StreamHandler(sys.stdout)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
