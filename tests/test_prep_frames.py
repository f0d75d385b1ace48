"""Frames that are written while they are first looked at: the same bytes as those that are written when all is planned.

In: films that nwb_builders writes, stores in temporary folders. Out: nothing.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nwb_builders import RNG, with_units, write
from pynwb import NWBFile
from pynwb.image import ImageSeries
from store_builders import target, tree, write_plan

import prep.frames
import prep.write_session
from prep.frames import STIMULI, writing_what_is_seen
from prep.nwb.session import plan_session
from prep.plan import SessionPlan
from prep.recipe import Recipe

RUN = "test"  # as store_builders call it


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prep.frames, "FRAME_CHUNK_BYTES", 3 * 20)  # three frames of 4 x 5
    monkeypatch.setattr(prep.frames, "SHARD_BYTES", 6 * 20)


def recording(folder: Path, *films: np.ndarray) -> Path:
    """A file that shows these films."""

    def fill(nwb: NWBFile) -> None:
        for number, pixels in enumerate(films):
            nwb.add_stimulus(ImageSeries(name=f"film{number}", data=pixels, unit="n.a.", format="raw", rate=30.0))
        with_units(np.arange(0.0, 60.0, 0.7))(nwb)

    folder.mkdir()
    return write(folder, fill)


def film(num_frames: int, num_distinct: int, *size: int) -> np.ndarray:
    return RNG.integers(0, 256, (num_distinct, *size), dtype=np.uint8)[np.arange(num_frames) % num_distinct]


def seen(path: Path, root: Path) -> SessionPlan:
    """The plan of a file, whose frames may be written as they are seen."""
    with writing_what_is_seen(root, RUN):
        return plan_session(path, Recipe(), "d1")


def stored(plan: SessionPlan, root: Path) -> dict[str, str]:
    write_plan(plan, target(root, plan))
    assert not list(root.glob("*/.*.partial.zarr"))
    return tree(root)


@pytest.fixture
def decoded_again(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The shards of frames that are read once more, to be written."""
    shards: list[int] = []
    write_frames = prep.write_session.write_frames

    def counted(partial: Path, rows: Any, shard: int, frames: Any) -> None:
        shards.append(shard)
        write_frames(partial, rows, shard, frames)

    monkeypatch.setattr(prep.write_session, "write_frames", counted)
    return shards


@pytest.mark.parametrize(
    ("num_frames", "num_distinct"),
    [(1, 1), (2, 2), (5, 5), (6, 6), (7, 7), (13, 13), (20, 12), (20, 13), (40, 2), (9, 4)],
)
def test_frames_written_as_they_are_seen_are_the_same_bytes(
    tmp_path: Path, decoded_again: list[int], num_frames: int, num_distinct: int
) -> None:
    path = recording(tmp_path / "in", film(max(2, num_frames), num_distinct, 4, 5))
    early = stored(seen(path, tmp_path / "early"), tmp_path / "early")
    assert decoded_again == []
    assert stored(plan_session(path, Recipe(), "d1"), tmp_path / "late") == early
    assert len(decoded_again) == -(-num_distinct // 6)


def test_frames_of_several_films_of_one_size_are_each_written_as_they_are_seen(
    tmp_path: Path, decoded_again: list[int]
) -> None:
    path = recording(tmp_path / "in", film(8, 8, 4, 5), film(7, 7, 3, 5))
    early = stored(seen(path, tmp_path / "early"), tmp_path / "early")
    assert decoded_again == []
    assert stored(plan_session(path, Recipe(), "d1"), tmp_path / "late") == early


def test_a_film_that_the_store_may_have_is_not_written_once_more(tmp_path: Path) -> None:
    path, root = recording(tmp_path / "in", film(8, 8, 4, 5)), tmp_path / "store"
    stored(seen(path, root), root)
    seen(path, root)
    assert not list((root / STIMULI).glob(".*"))


def test_a_film_that_two_sessions_see_at_once_is_written_by_one_of_them(tmp_path: Path) -> None:
    path, root = recording(tmp_path / "in", film(8, 8, 4, 5)), tmp_path / "store"
    seen(path, root)
    seen(path, root)
    assert len(list((root / STIMULI).glob(".*"))) == 1


def test_a_disk_that_is_full_while_frames_are_seen_costs_no_film(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded_again: list[int]
) -> None:
    path = recording(tmp_path / "in", film(20, 20, 4, 5))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(prep.frames, "write_frames", full)
        plan = seen(path, tmp_path / "early")
    assert not list((tmp_path / "early").glob("*/.*"))
    early = stored(plan, tmp_path / "early")
    assert decoded_again == [0, 1, 2, 3]
    assert stored(plan_session(path, Recipe(), "d1"), tmp_path / "late") == early
