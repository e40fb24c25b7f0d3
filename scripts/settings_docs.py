"""Writes the table of a study's settings in docs/study.md from lorkd_monai/settings.py.

    python scripts/settings_docs.py [--check]

With --check nothing is written, and a table that is not up to date ends with exit code 1.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from lorkd_monai.settings import STUDY_SETTINGS
from lorkd_monai.study.settings import default_settings

PAGE = Path(__file__).resolve().parent.parent / "docs" / "study.md"
KINDS = (("classification", 2), ("classification", 3), ("segmentation", 2), ("segmentation", 3))


def table() -> str:
    """A Markdown table, a row for each setting; defaults that differ in the order of ``KINDS``."""
    known = [default_settings(*kind).as_data() for kind in KINDS]
    lines = ["| setting | default | |", "|---|---|---|"]
    for name in known[0]:
        values = [one[name]["_target_"] if isinstance(one[name], dict) else one[name] for one in known]
        words = [value if isinstance(value, str) else json.dumps(value) for value in values]
        default = words[0] if len(set(words)) == 1 else " / ".join(words)
        lines.append(f"| `{name}` | `{default}` | {STUDY_SETTINGS[name].text} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write or check the page."""
    old = PAGE.read_text(encoding="utf-8")
    new = re.sub(r"\| setting \| default \| \|\n(\|.*\n)+", lambda _: table(), old)
    if new != old and "--check" in sys.argv[1:]:
        sys.exit(f"{PAGE} is not up to date; run python scripts/settings_docs.py")
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
