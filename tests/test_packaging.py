"""The frame: versions, extras, licence, scripts, and what importing the package loads."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import lorkd_monai

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
SCRIPTS = ["scripts/setup.sh", "scripts/test.sh", "scripts/demo.sh", ".ci/run"]


@pytest.fixture(scope="module")
def project(repository) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]


def requirement_name(line: str) -> str:
    return re.split(r"[\[<>=!;\s]", line, maxsplit=1)[0].lower()


def test_importing_the_package_is_light():
    program = "import lorkd_monai, lorkd_monai.errors, sys; print({'torch', 'monai', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_version_is_in_the_changelog(repository):
    assert f"## {lorkd_monai.__version__}" in (repository / "CHANGELOG.md").read_text()


def test_every_core_and_extra_requirement_has_a_tested_version(repository, project):
    lines = (repository / "constraints.txt").read_text().splitlines()
    pinned = {requirement_name(line) for line in lines if "==" in line and not line.startswith("#")}
    own_environments = {"label", "deploy"}  # these pin for themselves
    wanted = list(project["dependencies"])
    for extra, requirements in project["optional-dependencies"].items():
        wanted += [] if extra in own_environments else requirements
    assert {requirement_name(r) for r in wanted} - {"lorkd-monai"} <= pinned


def test_no_extra_holds_label_and_deploy_together(project):
    """They want different major versions of pydicom."""
    for requirements in project["optional-dependencies"].values():
        text = " ".join(requirements)
        assert not re.search(r"lorkd-monai\[[^]]*(label|deploy)", text)
        assert not ("monailabel" in text and "monai-deploy" in text)


def test_the_console_script_and_the_python_range(project):
    assert project["scripts"] == {"lorkd": "lorkd_monai.cli:main"}
    assert project["requires-python"] == ">=3.10,<3.13"


def test_typed_and_licensed(repository):
    assert (repository / "lorkd_monai" / "py.typed").is_file()
    licence = (repository / "LICENSE").read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_valid_bash(repository, script):
    subprocess.run(["bash", "-n", str(repository / script)], check=True)


def test_ci_runs_the_test_script_and_nothing_else(repository):
    last = (repository / ".ci" / "run").read_text().splitlines()[-1]
    assert last.strip() == "exec bash scripts/test.sh"


def test_setup_refuses_a_python_that_is_too_old(repository, tmp_path):
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(old), "LORKD_VENV": str(tmp_path / "venv")}
    done = subprocess.run(
        ["bash", str(repository / "scripts/setup.sh")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1 and "no Python 3.10, 3.11 or 3.12 found" in done.stderr
    assert not (tmp_path / "venv" / "bin").exists()


def test_setup_does_not_touch_a_folder_of_the_users(repository, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    environment = {"PATH": "/usr/bin:/bin", "LORKD_VENV": str(tmp_path)}
    done = subprocess.run(
        ["bash", str(repository / "scripts/setup.sh")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1 and "holds something that is no Python environment" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
