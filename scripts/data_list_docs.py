"""Writes lorkd_monai/data/dataset.schema.json and the tables of keys in docs/data.md from lorkd_monai/data/form.py.

    python scripts/data_list_docs.py [--check]

With --check nothing is written, and a file that is not up to date ends with exit code 1.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from lorkd_monai.data.form import TASK_KEYS, Key, json_schema

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = ROOT / "lorkd_monai" / "data" / "dataset.schema.json"
PAGE = ROOT / "docs" / "data.md"


def table(keys: Mapping[str, Key]) -> str:
    """A Markdown table, a row for each key."""
    rows = [f"| `{name}` |{' yes' if key.needed else ''} | {key.text} |" for name, key in keys.items()]
    return "\n".join(["| key | needed | |", "|---|---|---|", *rows])


def wanted() -> dict[Path, str]:
    """What each file must hold."""
    page = re.sub(
        r"\| key \| needed \| \|\n(\|.*\n)+", lambda _: table(TASK_KEYS) + "\n", PAGE.read_text(encoding="utf-8")
    )
    return {SCHEMA: json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n", PAGE: page}


def main() -> None:
    """Write or check both files."""
    old = {file: text for file, text in wanted().items() if not file.is_file() or file.read_text("utf-8") != text}
    for file, text in old.items():
        if "--check" in sys.argv[1:]:
            sys.exit(f"{file} is not up to date; run python scripts/data_list_docs.py")
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
