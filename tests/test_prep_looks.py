"""A plan that several tasks share: each long look is taken once, and plan and store are as if one had made them.

In: recordings that nwb_builders writes, with a film, spikes and running. Out: nothing.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client
from nwb_builders import running, with_units, write
from pynwb import NWBFile
from pynwb.image import ImageSeries
from store_builders import tree

import prep.jobs
from prep.catalog import Source
from prep.cluster import connect
from prep.files import InputFile, find_files
from prep.ingest import run_ingest
from prep.jobs import is_large, joined
from prep.looks import FILMS, KINDS, SPIKES, LeftToOthers, Looks, knowing, look
from prep.nwb import pixels, spike_audit, spike_features
from prep.recipe import Recipe
from prep.tasks import CHANGED, Failed, Planned, look_ahead_task, plan_by_looks_task, plan_from_nwb, source_task
from prep.verify import verify


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with connect(None, 2) as connected:
        yield connected


def recording(folder: Path, name: str = "s1.nwb") -> Path:
    """A film, spikes and running, a minute of each."""
    rng = np.random.default_rng(2)

    def fill(nwb: NWBFile) -> None:
        film = rng.integers(0, 256, (1_800, 8, 9), dtype=np.uint8)
        nwb.add_stimulus(ImageSeries(name="film", data=film, unit="n.a.", format="raw", rate=30.0))
        with_units(*(np.sort(rng.uniform(0.0, 60.0, number)) for number in (400, 3, 1_200)))(nwb)
        running(rng.normal(size=3_600), rate=60.0)(nwb)

    folder.mkdir(exist_ok=True)
    return write(folder, fill, name)


def squared(number: int) -> int:
    return number**2


def test_what_is_known_is_not_looked_for_again_and_what_others_take_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    assert look(FILMS, squared, 3) == 9
    looks = Looks(stamp="a file", left=frozenset({FILMS}))
    with knowing(looks):
        assert look(SPIKES, squared, 3) == 9
        with pytest.raises(LeftToOthers):
            look(FILMS, squared, 4)
    with knowing(replace(looks, found=dict.fromkeys(looks.found, 10))):
        assert look(FILMS, squared, 3) == 10
    with knowing(Looks(stamp="the file was changed", found=looks.found)):
        assert look(FILMS, squared, 3) == 9
    assert len(looks.found) == 2


def test_a_plan_by_what_others_have_found_is_the_plan_and_looks_at_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = InputFile((recording(tmp_path / "in"),), "s1.nwb", "d1")
    ahead = [look_ahead_task(plan_from_nwb, file, Recipe(), tmp_path / "store", "", kind) for kind in KINDS]
    assert sorted(len(looks.found) for looks in ahead) == [1, 3]
    whole = plan_from_nwb(file.paths, Recipe(), "d1")

    def again(*_: Any) -> None:
        raise AssertionError("it is known already")

    for module, name in (
        (pixels, "_look"), (spike_audit._Tally, "add"), (spike_audit.Extent, "add"), (spike_features, "_intervals")
    ):  # fmt: skip
        monkeypatch.setattr(module, name, again)
    planned = plan_by_looks_task(plan_from_nwb, file, Recipe(), *ahead)
    assert isinstance(planned, Planned) and planned.plan is not None and planned.sources == ()
    for name in ("coverage", "findings", "splits", "session_id"):
        assert getattr(planned.plan, name) == getattr(whole, name)
    assert [stimulus.digest for stimulus in planned.plan.stimuli] == [stimulus.digest for stimulus in whole.stimuli]
    assert np.array_equal(planned.plan.units.spike_features, whole.units.spike_features, equal_nan=True)


def test_what_goes_wrong_with_a_look_is_what_the_plan_says() -> None:
    failed = Failed("", "the decoder has a fault")
    assert plan_by_looks_task(plan_from_nwb, InputFile((), "s1.nwb", "d1"), Recipe(), Looks(stamp=()), failed) == failed


def ingested(client: Client, source: Path, store: Path, num_workers: int) -> list[tuple[str, str]]:
    files = find_files([source], "d1", store)
    outcomes = run_ingest(files, store, Recipe(), lambda: client, planner=plan_from_nwb, num_workers=num_workers)
    return [(row.state, row.reason) for row in outcomes]


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All files count as large; the files whose plans were shared."""
    names: list[str] = []
    monkeypatch.setattr(prep.jobs, "LARGE_BYTES", 0)
    share = prep.ingest.Run._share_plan

    def counted(self: Any, job: Any, *args: Any) -> None:
        names.append(job.file.label)
        share(self, job, *args)

    monkeypatch.setattr(prep.ingest.Run, "_share_plan", counted)
    return names


def test_a_plan_that_is_shared_makes_the_same_store(client: Client, tmp_path: Path, shared: list[str]) -> None:
    path = recording(tmp_path / "in")
    assert ingested(client, path, tmp_path / "alone", 1) == [("ok", "as d1/s1.zarr")]
    assert shared == []
    assert ingested(client, path, tmp_path / "together", 2) == [("ok", "as d1/s1.zarr")]
    assert shared == ["s1.nwb"]
    assert [problem for row in verify(tmp_path / "together") for problem in row.problems] == []
    assert tree(tmp_path / "together") == tree(tmp_path / "alone")
    assert ingested(client, path, tmp_path / "together", 2) == [("already there", "as d1/s1.zarr")]


def test_a_damaged_file_whose_plan_is_shared_fails_with_the_same_words_and_alone(
    client: Client, tmp_path: Path, shared: list[str]
) -> None:
    path = recording(tmp_path / "in")
    recording(tmp_path / "in", "s2.nwb")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    alone = ingested(client, tmp_path / "in", tmp_path / "alone", 1)
    together = ingested(client, tmp_path / "in", tmp_path / "together", 3)
    assert shared == ["s1.nwb", "s2.nwb"]
    assert together == alone and [state for state, _ in alone] == ["refused", "ok"]
    assert tree(tmp_path / "together") == tree(tmp_path / "alone")


def test_a_file_that_changes_between_the_tasks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s1.nwb"
    path.write_bytes(b"1")
    told = source_task(InputFile((path,), "s1.nwb", "d1"))
    planned = Planned((), stamps=told[1])
    assert joined(planned, told) == replace(planned, sources=told[0])
    assert told[0] == (Source(file="s1.nwb", bytes=1, sha256=told[0][0].sha256),)
    assert joined(replace(planned, stamps=((path, 2, 3),)), told) == Failed("", CHANGED)


def test_only_one_local_file_that_takes_seconds_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s1.nwb"
    path.write_bytes(b"123")
    monkeypatch.setattr(prep.jobs, "LARGE_BYTES", 2)
    assert is_large(InputFile((path,), "s1.nwb", "d1"))
    assert not is_large(InputFile((path, path), "s1.nwb", "d1")), "joined files are planned one after the other"
    assert not is_large(InputFile((tmp_path,), "x.nwb.zarr", "d1"))
    monkeypatch.setattr(prep.jobs, "LARGE_BYTES", 3)
    assert not is_large(InputFile((path,), "s1.nwb", "d1"))
