"""A folder has one worker at a time, and what a living process writes is not taken for a leftover."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest
from filelock import FileLock, Timeout

from lorkd_monai.errors import LoRKDError
from lorkd_monai.files import atomic_file, remove_leftovers
from lorkd_monai.locks import claim, claimed, is_abandoned, mark_in_use, release


def elsewhere(code, *arguments):
    """A process that runs ``code`` and says something when it is there; it waits for its input then."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "here\n"
    return process


CLAIM = """
import sys
from lorkd_monai.locks import claim
claim(sys.argv[1], "")
print("here", flush=True)
input()
"""
WRITE = """
import sys
from lorkd_monai.files import atomic_file
with atomic_file(sys.argv[1]) as temporary:
    temporary.write_text("whole")
    print("here", flush=True)
    input()
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, None])
def test_a_claimed_folder_is_free_again_when_its_process_ends(end, tmp_path):
    process = elsewhere(CLAIM, tmp_path / "run")
    for _ in range(2):
        with pytest.raises(LoRKDError, match="run is in use: another process.*another --output_dir"):
            claim(tmp_path / "run", "Give another --output_dir")
    claim(tmp_path / "other", "")
    release(tmp_path / "other")
    process.communicate("\n") if end is None else (process.send_signal(end), process.communicate())
    with claimed(tmp_path / "run", ""):
        pass
    assert os.listdir(tmp_path / "run") == []


def test_claims_of_one_process_add_up(tmp_path):
    claim(tmp_path, "")
    with claimed(tmp_path, ""):
        pass
    assert os.listdir(tmp_path) == [".in_use.lock"]
    release(tmp_path)
    assert os.listdir(tmp_path) == []
    claim(tmp_path, "")
    claim(tmp_path / "below", "")
    release()
    elsewhere(CLAIM, tmp_path).communicate("\n")


def test_what_a_living_process_writes_is_no_leftover(tmp_path):
    last = tmp_path / "last.pt"
    process = elsewhere(WRITE, last)
    remove_leftovers(last)
    process.communicate("\n")
    assert process.returncode == 0 and last.read_text() == "whole"
    assert os.listdir(tmp_path) == ["last.pt"]


def test_what_a_killed_process_wrote_is_a_leftover(tmp_path):
    process = elsewhere(WRITE, tmp_path / "last.pt")
    process.kill()
    process.communicate()
    assert len(os.listdir(tmp_path)) == 2
    remove_leftovers(tmp_path / "last.pt")
    assert os.listdir(tmp_path) == []


def test_a_write_of_this_process_is_no_leftover_either(tmp_path):
    with atomic_file(tmp_path / "last.pt") as temporary:
        remove_leftovers(tmp_path / "last.pt")
        assert temporary.exists()


def test_a_mark_ends_with_its_block(tmp_path):
    with mark_in_use(tmp_path / "a"):
        assert not is_abandoned(tmp_path / "a")
    assert is_abandoned(tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_a_lock_file_is_deleted_while_its_lock_is_held(tmp_path, monkeypatch):
    deleted = []

    def unlink(path, **options):
        with pytest.raises(Timeout):  # as a third process would, in a gap between the two
            FileLock(path).acquire(timeout=0)
        deleted.append(path.name)
        os.unlink(path)

    monkeypatch.setattr(pathlib.Path, "unlink", unlink)
    with claimed(tmp_path, ""):
        pass
    with mark_in_use(tmp_path / "a"):
        pass
    assert is_abandoned(tmp_path / "b")
    claim(tmp_path, "")
    release()
    assert deleted == [".in_use.lock", "a.lock", "b.lock", ".in_use.lock"]
