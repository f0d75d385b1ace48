"""What ingest tells a person: one row per file, and the list of failures.

In: outcomes. Out: a table on stdout, `<STORE>/failed.jsonl`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prep.store import write_bytes

PLAIN_WIDTH = 160  # where the output is no terminal: a log, a pipe


@dataclass
class Outcome:
    """What became of one input file."""

    file: str
    state: str = "running"  # ok | already there | would be ingested | refused | failed
    reason: str = ""
    object: str = ""  # what failed inside the file
    num_streams: int = 0
    num_tokens: int = 0
    seconds: float = 0.0

    @property
    def is_failure(self) -> bool:
        return self.state in ("refused", "failed", "running")

    def count(self, streams: Iterable[Mapping[str, Any]]) -> None:
        """Count streams and tokens, from the catalog's entries of streams."""
        tokens = [int(stream["num_tokens"]) for stream in streams]
        self.num_streams, self.num_tokens = len(tokens), sum(tokens)


def table_console() -> Console:
    """A console for tables, wide enough for one-line reasons where no terminal sets the width."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def print_table(outcomes: Sequence[Outcome], verdict: str) -> None:
    """One row per file, then how many of them came to the `verdict`."""
    table = Table("file", "state", "streams", "tokens", "seconds", "what", box=None, pad_edge=False)
    for column in table.columns[2:5]:
        column.justify = "right"
    for row in outcomes:
        what = f"{row.object}: {row.reason}" if row.object else row.reason
        numbers = (str(row.num_streams), f"{row.num_tokens:,}", f"{row.seconds:.1f}")
        table.add_row(Text(row.file), row.state, *numbers, Text(what, overflow="fold"))
    console = table_console()
    console.print(table)
    failures = [row for row in outcomes if row.is_failure]
    done = len(outcomes) - len(failures)
    console.print(f"{done} of {len(outcomes)} files {verdict}" + (f", {len(failures)} failed." if failures else "."))


def write_failures(root: Path, outcomes: Sequence[Outcome]) -> None:
    """`failed.jsonl`: one line per file that failed in the last run; absent where none did."""
    rows = [
        {"file": row.file, "state": row.state, "object": row.object, "error": row.reason}
        for row in outcomes
        if row.is_failure
    ]
    path = root / "failed.jsonl"
    path.unlink(missing_ok=True)
    if rows:
        write_bytes(path, "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows).encode())
