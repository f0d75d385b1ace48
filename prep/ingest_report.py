"""What ingest tells a person: one row per file, and the list of failures.

In: outcomes. Out: a table on stdout, `<STORE>/failed.jsonl`.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prep.disk import write_bytes
from prep.text_table import table_lines, terminal_width


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


def print_table(outcomes: Sequence[Outcome], verdict: str) -> None:
    """One row per file, then how many of them came to the `verdict`."""
    header = ("file", "state", "streams", "tokens", "seconds", "where it is, or why not")
    rows = []
    for row in outcomes:
        what = f"{row.object}: {row.reason}" if row.object else row.reason
        numbers = (str(row.num_streams), f"{row.num_tokens:,}") if row.num_streams else ("-", "-")
        rows.append((row.file, row.state, *numbers, f"{row.seconds:.1f}" if row.seconds else "-", what))
    print("\n".join(table_lines(header, rows, right=header[2:5], width=terminal_width())))
    failures = Counter(row.state for row in outcomes if row.is_failure)
    not_done = "".join(f", {count} {state}" for state, count in sorted(failures.items()))
    print(f"{len(outcomes) - failures.total()} of {len(outcomes)} files {verdict}{not_done}.")


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
