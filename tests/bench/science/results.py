"""RESULTS.md in sections: each bench owns one, and leaves the others as they are.

In: the file, a section's name, its text. Out: the file with that section replaced, or added at the end.

A section stands between two comments that name it. What stands outside of any is the section of `make bench`, which
wrote the whole file before it had sections.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FIRST = "make bench"
BEGIN, END = "<!-- section: {} -->", "<!-- end of section: {} -->"
SECTION = re.compile(r"<!-- section: (?P<name>.+?) -->\n(?P<text>.*?)<!-- end of section: (?P=name) -->\n?", re.DOTALL)
COMMENT = re.compile(r"<!-- (?:end of )?section: .*?-->")


class ResultsError(ValueError):
    """A results file whose sections cannot be told apart."""


def write_section(path: Path, name: str, text: str) -> None:
    """Replace one section of the file; where its comments do not match, raises ResultsError and writes nothing."""
    if not name.strip() or COMMENT.search(text) or "-->" in name:
        raise ResultsError(f"section {name!r}: its name is empty, or name or text hold a comment that marks sections")
    found = read_sections(path)
    found[name] = text.strip("\n") + "\n"
    blocks = [f"{BEGIN.format(each)}\n{body}{END.format(each)}\n" for each, body in found.items()]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("\n".join(blocks), encoding="utf-8")
    os.replace(partial, path)


def read_sections(path: Path) -> dict[str, str]:
    """{name: text} in the order of the file; nothing where there is no file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found: dict[str, str] = {}
    for match in SECTION.finditer(text):
        if match["name"] in found:
            raise ResultsError(f"{path}: the section {match['name']!r} stands there twice; delete one of them")
        found[match["name"]] = match["text"]
    rest = SECTION.sub("", text)
    for body in (rest, *found.values()):
        if stray := COMMENT.search(body):
            raise ResultsError(f"{path}: {stray[0]} has no counterpart; repair the comments, or delete the section")
    if rest.strip():
        if FIRST in found:
            raise ResultsError(f"{path}: {rest.strip().splitlines()[0][:60]!r} stands outside of any section")
        found = {FIRST: rest.strip("\n") + "\n", **found}
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; numbers as they are given, so that each column says its own precision."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
