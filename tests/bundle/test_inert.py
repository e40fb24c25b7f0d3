"""Text from a data list never becomes code, a reference, a path or markup."""

from __future__ import annotations

import pytest

from lorkd_monai.bundle.inert import check_task_name, inert_text, is_inert, markdown_text
from lorkd_monai.errors import LoRKDError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("DR grade 0", "DR grade 0"),
        ("100% stenosis", "100% stenosis"),
        ("a@b.org", "a@b.org"),
        ("3 $", "3 $"),
        ("$(rm -rf)", " $(rm -rf)"),
        ("%x.json", " %x.json"),
        ("@device", " @device"),
        ("@", " @"),
        ("@a#b", " @a#b"),
        ("x %#y", "x % #y"),
        ("x @##y", "x @ ##y"),
        ("x @::y", "x @ ::y"),
        ("two\n lines\t", "two lines"),
    ],
)
def test_inert_text(text, expected):
    assert inert_text(text) == expected
    assert is_inert(expected)


def test_markdown_text():
    assert markdown_text("a | b\n<script> *x* `y` [z](w)") == r"a \| b \<script\> \*x\* \`y\` \[z\](w)"


def test_check_task_name():
    assert check_task_name("blood_cell-2") == "blood_cell-2"
    for bad in ("a/b", "../a", "a.b", "a b", "", "ä", "a\n", None):
        with pytest.raises(LoRKDError, match="rename the task in the data list"):
            check_task_name(bad)
