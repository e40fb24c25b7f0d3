"""How errors that the user can fix are shown."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lorkd_monai.errors import LoRKDError, find_lorkd_error, first_line, root_cause


def caught(text: str) -> BaseException:
    """Run ``text`` and return what it raises."""
    with pytest.raises(BaseException) as info:
        exec(text, {"LoRKDError": LoRKDError})
    return info.value


WRAPPED = """
try:
    raise LoRKDError("the list is empty")
except LoRKDError as error:
    raise RuntimeError("failed to instantiate {a hundred lines of config}") from error
"""


def test_it_is_a_value_error():
    assert issubclass(LoRKDError, ValueError)


def test_found_below_the_errors_of_others():
    assert str(find_lorkd_error(caught(WRAPPED))) == "the list is empty"
    assert str(find_lorkd_error(caught(WRAPPED.replace(" from error", "")))) == "the list is empty"


def test_the_outermost_of_ours_is_the_one():
    error = caught(WRAPPED.replace("RuntimeError(", "LoRKDError("))
    assert find_lorkd_error(error) is error


def test_not_found_where_there_is_none_or_the_context_was_cut_off():
    assert find_lorkd_error(None) is None
    assert find_lorkd_error(KeyError("x")) is None
    assert find_lorkd_error(caught(WRAPPED.replace("from error", "from None"))) is None


def test_a_circle_of_causes_ends():
    first, second = KeyError("a"), KeyError("b")
    first.__cause__, second.__cause__ = second, first
    assert find_lorkd_error(first) is None


def run(body: str, **environment: str) -> subprocess.CompletedProcess:
    program = f"from lorkd_monai.errors import *\nshow_errors_plainly()\n{body}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment or None)


def test_shown_as_one_line_with_exit_code_1():
    done = run(WRAPPED)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: the list is empty\n")


def test_other_errors_keep_their_traceback():
    done = run("1 / 0")
    assert done.returncode == 1 and "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


def test_the_traceback_can_be_asked_for():
    done = run(WRAPPED, LORKD_TRACEBACK="1")
    assert done.returncode == 1 and "Traceback" in done.stderr and "the list is empty" in done.stderr


def test_the_root_cause_is_one_line() -> None:
    inner = KeyError("\n  the file has no key 'x'\nmore")
    outer = RuntimeError("applying transform <…>")
    outer.__cause__ = inner
    assert root_cause(outer) == root_cause(inner) == f"KeyError: {inner}"[:300]
    outer.__cause__ = ValueError("\n  no such file\nmore")
    assert root_cause(outer) == "ValueError: no such file"
    assert root_cause(ValueError("x" * 400)) == f"ValueError: {'x' * 300}"
    assert root_cause(AssertionError()) == "AssertionError"


def test_the_first_line_of_an_error() -> None:
    assert first_line(ValueError("\n  no such file \nmore")) == "no such file"
    assert first_line(AssertionError()) == "AssertionError()" and len(first_line(ValueError("x" * 400))) == 300
