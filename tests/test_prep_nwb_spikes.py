"""Spikes of a stream whose shards are written in one pass: counted at once, or by way of files where they are many.

In: spike times that nwb_builders writes. Out: nothing.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
from nwb_builders import plan, stream, with_units

import prep.nwb.spikes
from prep.plan import SequentialReader


def test_pieces_that_are_counted_at_once_or_by_way_of_files_are_what_is_read_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    spikes = [np.sort(rng.uniform(0.0, 90.0, number)) for number in (3_000, 1, 40, 900)]
    item = stream(plan(tmp_path, with_units(*spikes)), "spikes")
    edges, reader = (0, 300, 301, 640, item.spec.num_tokens), item.reader
    assert isinstance(reader, SequentialReader)
    at_once = list(reader.read_once(edges, tmp_path / "scratch"))
    assert not (tmp_path / "scratch").exists()
    monkeypatch.setattr(prep.nwb.spikes, "COUNTED_BYTES", 0)
    by_files = list(reader.read_once(edges, tmp_path / "scratch"))
    alone = [reader.read(start, stop) for start, stop in itertools.pairwise(edges)]
    assert sum(int(piece.sum()) for piece in alone) == sum(map(len, spikes))
    for pieces in (at_once, by_files):
        assert all(np.array_equal(*pair) for pair in zip(pieces, alone, strict=True))
