"""Writes the golden store: a small store that every later reader must read to the same values.

In: nothing. Out: tests/golden/store. Run `python tests/golden/build_golden.py` only to add a store of a new version.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from store_builders import build_store  # noqa: E402  the path comes first

import prep.write_session  # noqa: E402  likewise


def build(store: Path) -> None:
    """One small session and its stimulus; the recording's bytes are part of the seal."""
    recording = store.parent / "golden.nwb"
    recording.write_text("a golden recording\n")
    build_store(store, recording, "s1")
    recording.unlink()
    (store / ".lock").unlink(missing_ok=True)


if __name__ == "__main__":
    prep.write_session.software_version = lambda: "golden"
    build(HERE / "store")
