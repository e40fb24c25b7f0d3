"""Files appear in full or not at all."""

import os

import pytest
import torch

from lorkd_monai.files import atomic_file, remove_leftovers


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "figures.json"
    for text in ("one", "two"):
        with atomic_file(path) as temporary:
            assert temporary.parent == tmp_path
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == text
        assert os.listdir(tmp_path) == ["figures.json"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_a_failure_leaves_the_former_file(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("whole")
    with pytest.raises(ValueError, match="disk full"), atomic_file(path) as temporary:
        temporary.write_text("ha")
        raise ValueError("disk full")
    assert path.read_text() == "whole"
    assert os.listdir(tmp_path) == ["figures.json"]


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "a"
    with atomic_file(path) as one, atomic_file(path) as two:
        assert one != two
        one.write_text("1")
        two.write_text("2")
    assert path.read_text() == "1"


def test_leftovers_of_a_killed_process(tmp_path):
    for name in (".last.pt.77-0123abcd.tmp", ".model.pt.77-0123abcd.tmp", "last.pt", ".last.pt.swp"):
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path / "last.pt")
    assert sorted(os.listdir(tmp_path)) == [".last.pt.swp", ".model.pt.77-0123abcd.tmp", "last.pt"]
    remove_leftovers(tmp_path / "no folder" / "last.pt")


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_files_are_as_readable_as_other_new_files(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "plain").touch()
    with atomic_file(tmp_path / "model.safetensors") as temporary:
        save_file({"w": torch.zeros(2)}, temporary)
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_lock_that_a_killed_process_left_alone_goes_too(tmp_path):
    """The process was killed between moving the file into place and deleting the lock beside it."""
    (tmp_path / ".last.pt.123-0a1b2c3d.tmp.lock").touch()
    (tmp_path / ".other.pt.123-0a1b2c3d.tmp.lock").touch()
    remove_leftovers(tmp_path / "last.pt")
    assert [path.name for path in tmp_path.iterdir()] == [".other.pt.123-0a1b2c3d.tmp.lock"]
