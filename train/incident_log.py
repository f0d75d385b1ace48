"""Rows of incidents.jsonl, which nothing removes: what went wrong in a run, from a rank or from the launcher.

In: a row. Out: a line of JSON, with the time.
"""

import time
from pathlib import Path
from typing import Any

from train.metrics import line_of

INCIDENTS = "incidents.jsonl"


def append(run_dir: Path, row: dict[str, Any]) -> None:
    """Add a row: a step, what it was, and more. Any process may: a line is one write."""
    with open(run_dir / INCIDENTS, "a") as file:
        file.write(line_of({**row, "unix_s": time.time()}))
