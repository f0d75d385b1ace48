"""What all fault campaigns have in common: rows that are appended to a table, so that one that was stopped goes on.

In: what does one run, how a row is told. Out: the rows of a table, and its summary for people beside it. A row is a
dataclass with number, fault, first_code, first_s, rerun_s, said, and properties is_sound and where (the fault met it).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

Row = TypeVar("Row")


def rows_of(kind: Callable[..., Row], table: Path) -> list[Row]:
    """What earlier campaigns have found."""
    lines = table.read_text().splitlines() if table.exists() else []
    return [kind(**json.loads(line)) for line in lines]


def go_on(
    kind: Callable[..., Row],
    table: Path,
    num_runs: int,
    one_run: Callable[[int], Row],
    told: Callable[[Row], str],
    summary: Callable[[Sequence[Row]], str],
) -> list[Row]:
    """Do the next `num_runs` runs; returns their rows."""
    first = len(rows_of(kind, table))
    table.parent.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + num_runs):
        row: Any = one_run(number)
        with open(table, "a") as file:
            file.write(json.dumps(asdict(row), sort_keys=True) + "\n")
        print(f"{number:4d} {told(row)}: {'sound' if row.is_sound else 'NOT SOUND ' + row.said}", flush=True)
    rows = rows_of(kind, table)
    table.with_suffix(".md").write_text(summary(rows))
    return rows[first:]


def by_fault(rows: Sequence[Any], **more: Callable[[list[Any]], str]) -> list[str]:
    """Lines of a table, one for each fault; `more` columns, of the rows of one fault."""
    head = ["fault", "runs", "sound", *(name.replace("_", " ") for name in more), "exit codes of the disturbed run",
            "slowest disturbed run", "slowest rerun"]  # fmt: skip
    lines = [line_of(head), line_of(["---"] * len(head), "")]
    for fault in sorted({row.fault for row in rows}):
        mine = [row for row in rows if row.fault == fault]
        codes = ", ".join(sorted({code_of(row) for row in mine}))
        slowest = [f"{max(row.first_s for row in mine):.0f} s", f"{max(row.rerun_s for row in mine):.0f} s"]
        sound = sum(row.is_sound for row in mine)
        lines.append(line_of([fault, len(mine), sound, *(column(mine) for column in more.values()), codes, *slowest]))
    return lines


def by_run(head: Sequence[str], rows: Sequence[Any], cells: Callable[[Any], Sequence[object]]) -> list[str]:
    """Lines of a table, one for each run, and what was said of those that are not sound."""
    head = ["run", "fault", *head, "sound"]
    lines = ["", line_of(head), line_of(["---"] * len(head), "")]
    lines += [line_of([row.number, row.fault, *cells(row), row.is_sound]) for row in rows]
    unsound = [row for row in rows if not row.is_sound]
    return [*lines, "", *(f"* not sound: run {row.number} ({row.where}): {row.said}" for row in unsound)]


def line_of(cells: Sequence[object], blank: str = " ") -> str:
    """A line of a table."""
    return "|" + "|".join(f"{blank}{cell}{blank}" for cell in cells) + "|"


def code_of(row: Any) -> str:
    """The exit code of the run that the fault met."""
    return "hung" if row.first_code is None else str(row.first_code)
