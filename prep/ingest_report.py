"""What ingest tells a person: one row per file (or per session of joined files), and the list of failures.

In: outcomes. Out: a table on stdout, `<STORE>/failed.jsonl`.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prep.disk import write_bytes
from prep.text_table import table_lines, terminal_width


@dataclass
class Outcome:
    """What became of one input file, or of the files of one session."""

    file: str
    state: str = "running"  # ok | partly | already there | would be ingested | refused | failed
    reason: str = ""
    object: str = ""  # what failed inside the file
    num_streams: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    refused: tuple[tuple[str, str], ...] = ()  # broken objects that the session is without: path, message
    coverage: dict[str, int] = field(default_factory=dict)  # how many objects, used, skipped; {} = could not be read

    @property
    def is_missing(self) -> bool:
        """Whether nothing of the file is in the store."""
        return self.state in ("refused", "failed", "running")

    @property
    def is_failure(self) -> bool:
        """Whether the file, or an object of it, is not in the store."""
        return self.is_missing or bool(self.refused)

    @property
    def told(self) -> str:
        """Where it is or why not, and what is missing there."""
        where = f"{self.object}: {self.reason}" if self.object else self.reason
        return "; ".join([where, *(f"without {path}: {message}" for path, message in self.refused)])

    def count(self, streams: Iterable[Mapping[str, Any]]) -> None:
        """Count streams and tokens, from the catalog's entries of streams."""
        tokens = [int(stream["num_tokens"]) for stream in streams]
        self.num_streams, self.num_tokens = len(tokens), sum(tokens)


def print_table(outcomes: Sequence[Outcome], verdict: str) -> None:
    """One row per file, then how many of them came to the `verdict`."""
    header = ("file", "state", "streams", "tokens", "seconds", "where it is, or why not")
    rows = []
    for row in outcomes:
        numbers = (str(row.num_streams), f"{row.num_tokens:,}") if row.num_streams else ("-", "-")
        rows.append((row.file, row.state, *numbers, f"{row.seconds:.1f}" if row.seconds else "-", row.told))
    print("\n".join(table_lines(header, rows, right=header[2:5], width=terminal_width())))
    missing = Counter(row.state for row in outcomes if row.is_missing)
    not_done = "".join(f", {count} {state}" for state, count in sorted(missing.items()))
    num_partly = sum(bool(row.refused) for row in outcomes)
    partly = f" ({num_partly} of them without what is broken in it)" if num_partly else ""
    print(f"{len(outcomes) - missing.total()} of {len(outcomes)} files {verdict}{partly}{not_done}.")


def write_failures(root: Path, outcomes: Sequence[Outcome]) -> None:
    """`failed.jsonl`: one line per file that failed in the last run, or per object of it; absent where none did."""
    rows = []
    for row in outcomes:
        broken = [(row.state, row.object, row.reason)] if row.is_missing else []
        broken += [("partly", path, message) for path, message in row.refused]
        for state, where, error in broken:
            rows.append({"file": row.file, "state": state, "object": where, "error": error, "coverage": row.coverage})
    path = root / "failed.jsonl"
    path.unlink(missing_ok=True)
    if rows:
        write_bytes(path, "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows).encode())
