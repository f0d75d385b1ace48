"""RESULTS.md in sections: a bench that writes its own leaves every other byte.

In: files written here, and the real RESULTS.md. Out: nothing.
"""

import shutil
from pathlib import Path

import pytest
from bench.science.results import ResultsError, read_sections, table, write_section

RESULTS = Path(__file__).parent / "bench" / "RESULTS.md"
OLD = "# The benchmark of prep\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\nThe run took 8 minutes.\n"


def test_a_first_section_keeps_what_was_there_as_the_section_of_make_bench(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    path.write_text(OLD)
    write_section(path, "make bench-science", "# Science\n\nA figure: 1.\n")
    assert read_sections(path) == {"make bench": OLD, "make bench-science": "# Science\n\nA figure: 1.\n"}
    assert OLD in path.read_text()


def test_a_section_is_replaced_in_its_place_and_the_others_keep_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    for name in ("one", "two", "three"):
        write_section(path, name, f"text of {name}\n\nmore\n")
    before = path.read_text()
    write_section(path, "two", "shorter")
    after = path.read_text()
    assert after == before.replace("text of two\n\nmore\n", "shorter\n")
    assert list(read_sections(path)) == ["one", "two", "three"]


def test_writing_the_same_twice_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    path.write_text(OLD)
    write_section(path, "make bench-science", "A figure: 1.")
    before = path.read_bytes()
    write_section(path, "make bench-science", read_sections(path)["make bench-science"])
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["RESULTS.md"]


def test_the_section_of_make_bench_replaces_what_it_wrote_without_sections(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    path.write_text(OLD)
    write_section(path, "make bench", "# New")
    assert read_sections(path) == {"make bench": "# New\n"}


def test_a_section_named_like_the_beginning_of_another_is_another(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    write_section(path, "make bench-science", "science")
    write_section(path, "make bench", "prep")
    assert read_sections(path) == {"make bench-science": "science\n", "make bench": "prep\n"}


def test_the_real_results_survive_another_bench(tmp_path: Path) -> None:
    path = Path(shutil.copy(RESULTS, tmp_path))
    before = read_sections(path)
    write_section(path, "a bench that does not exist", "x")
    assert {name: text for name, text in read_sections(path).items() if name in before} == before
    assert before and all(text in RESULTS.read_text() for text in before.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- section: a -->\nx\n", "<!-- section: a --> has no counterpart"),
        ("x\n<!-- end of section: a -->\n", "<!-- end of section: a --> has no counterpart"),
        ("<!-- section: a -->\nx\n<!-- end of section: a -->\n" * 2, "'a' stands there twice"),
        ("<!-- section: make bench -->\nx\n<!-- end of section: make bench -->\nlost\n", "'lost' stands outside"),
        (
            "<!-- section: a -->\n<!-- section: b -->\nx\n<!-- end of section: b -->\n<!-- end of section: a -->\n",
            "<!-- section: b --> has no counterpart",
        ),
    ],
)
def test_a_file_whose_sections_cannot_be_told_apart_is_left_as_it_is(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "RESULTS.md"
    path.write_text(text)
    with pytest.raises(ResultsError, match=message):
        write_section(path, "a", "new")
    assert path.read_text() == text


@pytest.mark.parametrize(("name", "text"), [("", "x"), ("a --> b", "x"), ("a", "<!-- end of section: a -->")])
def test_a_name_or_a_text_that_would_break_the_sections_is_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(ResultsError, match="its name is empty, or name or text hold a comment"):
        write_section(tmp_path / "RESULTS.md", name, text)
    assert not list(tmp_path.iterdir())


def test_a_table_has_a_row_for_each() -> None:
    assert table(("what", "deg"), [("ridge", "8.16"), ("MLP", 6.5)]).splitlines() == [
        *("| what | deg |", "| --- | --- |", "| ridge | 8.16 |", "| MLP | 6.5 |")
    ]
