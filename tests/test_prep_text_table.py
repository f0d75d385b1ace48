"""Tables for people: aligned, never cut off, folded only where a terminal is narrow.

In: rows of texts. Out: nothing.
"""

import sys

import pytest

from prep.text_table import table_lines, terminal_width

HEADER = ("file", "tokens", "why")
ROWS = [("a.nwb", "1,000", "ok"), ("longer.nwb", "-", "no units, no traces, and nothing else that could be read of it")]


def test_in_a_pipe_one_row_is_one_line_without_blanks_at_its_end() -> None:
    assert table_lines(HEADER, ROWS, right=("tokens",)) == [
        "file        tokens  why",
        "a.nwb        1,000  ok",
        "longer.nwb       -  no units, no traces, and nothing else that could be read of it",
    ]


def test_on_a_terminal_the_last_column_is_folded() -> None:
    assert table_lines(HEADER, ROWS, right=("tokens",), width=56) == [
        "file        tokens  why",
        "a.nwb        1,000  ok",
        "longer.nwb       -  no units, no traces, and nothing",
        "                    else that could be read of it",
    ]


def test_on_a_narrow_terminal_the_last_column_goes_below() -> None:
    assert table_lines(HEADER, ROWS, width=40)[2:] == [
        "a.nwb       1,000",
        "    ok",
        "longer.nwb  -",
        "    no units, no traces, and nothing",
        "    else that could be read of it",
    ]


def test_no_rows_are_a_header_and_no_reason_is_no_line() -> None:
    assert table_lines(HEADER, []) == ["file  tokens  why"]
    assert table_lines(HEADER, [("a", "1", "")], width=80)[1:] == ["a     1"]


def test_a_pipe_has_no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    assert terminal_width() is None
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "77")
    assert terminal_width() == 77
