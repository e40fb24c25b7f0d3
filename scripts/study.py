"""Does decomposition pay? `python scripts/study.py OUTPUT --dataset_dir DATA` is `lorkd study` of this checkout."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fire

from lorkd_monai.cli.study import study
from lorkd_monai.errors import show_errors_plainly

if __name__ == "__main__":
    show_errors_plainly()
    fire.Fire(study, name="study.py")
