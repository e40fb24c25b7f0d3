"""Checks of arguments that several parts share."""

from __future__ import annotations

import pytest

from lorkd_monai.checks import as_value, check_whole, is_bundle_name, is_file_name, is_real, is_whole
from lorkd_monai.errors import LoRKDError


def test_names_of_files_and_of_bundles() -> None:
    assert all(map(is_file_name, ("a", "_", "-", "Spleen_CT-2", "x" * 100)))
    assert not any(map(is_file_name, ("", "a b", "a/b", "ä", "a\n", "..", None, 1)))
    assert is_bundle_name("spleen_segmentation") and is_bundle_name("a_b_classification")
    wrong = ("_segmentation", "segmentation", "spleen_detection", "a b_segmentation", "a_segmentation\n")
    assert not any(map(is_bundle_name, wrong))


def test_numbers() -> None:
    assert is_whole(1) and is_whole(0, 0) and not any(map(is_whole, (0, True, 1.0, "1", None, float("nan"))))
    assert is_real(0) and is_real(-1.5) and not any(map(is_real, (True, float("inf"), float("nan"), "1", None)))
    check_whole("rank", 3)
    with pytest.raises(LoRKDError, match=r"^rank must be a whole number of at least 2, got 1$"):
        check_whole("rank", 1, 2)


def test_values_of_a_command_line() -> None:
    assert as_value("{a: folder/b}") == {"a": "folder/b"} and as_value("[a, 2]") == ["a", 2]
    assert as_value("{a: ") is None and as_value("") is None
