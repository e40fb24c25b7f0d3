"""The experts that the tests of the apps share."""

from __future__ import annotations

from pathlib import Path

import pytest
from app_cases import EXPERTS, write_expert


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with all experts."""
    folder = tmp_path_factory.mktemp("experts")
    for name in EXPERTS:
        write_expert(folder, name)
    return folder
