"""What ingest makes of sessions: broken parts are named and the rest kept, any id has its folder, files are joined.

In: stand-ins for recordings, and NWB files that nwb_builders writes. Out: stores in temporary folders.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace as replace_in_plan
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from distributed import Client
from nwb_builders import replace, running, with_units, write
from pynwb import NWBFile
from store_builders import FakeRecipe, fake_planner, session, target, tree, write_plan
from test_prep_ingest import PATIENCE_S, command, failures, ingest, problems, recordings, states

import prep.jobs
from prep.catalog import Sealed, Source
from prep.files import InputFile, find_files
from prep.ingest import connect, run_ingest
from prep.ingest_report import Outcome, print_table
from prep.recipe import Recipe
from prep.store import Store
from prep.tasks import Failed, Planned, finish_task, plan_from_nwb
from prep.write_session import source_of


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with connect(None, 2) as connected:
        yield connected


# ---------------------------------------------------------------- sessions that lack a part


def test_a_session_without_a_broken_object_is_in_the_store_and_named_in_each_run(
    client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, store = recordings(tmp_path / "in", a="session=s1", b="session=s2 lost=its_index_is_broken"), tmp_path / "s"
    row = {"file": "b.nwb", "state": "partly", "object": "/acquisition/lick", "error": "its index is broken"}
    for expected in (["ok", "partly"], ["already there", "already there"]):
        outcomes = ingest(client, folder, store)
        assert states(outcomes) == expected
        assert [outcome.is_failure for outcome in outcomes] == [False, True]
        assert outcomes[1].told == "as d1/s2.zarr; without /acquisition/lick: its index is broken"
        assert failures(store) == [{**row, "coverage": {"objects": 1, "used": 1, "skipped": 0}}]
        print_table(outcomes, "are in the store")
        assert "2 of 2 files are in the store (1 of them without what is broken in it)." in capsys.readouterr().out
    assert Store(store).entries[1]["refused"] == [{"path": "/acquisition/lick", "message": "its index is broken"}]
    recordings(folder, b="session=s2")
    assert states(ingest(client, folder, store)) == ["already there", "ok"]
    assert failures(store) == []


def test_a_session_that_lacks_a_part_ends_the_command_with_exit_code_one(tmp_path: Path) -> None:
    folder, store = recordings(tmp_path / "in", a="session=s1 lost=its_index_is_broken"), tmp_path / "store"
    for state in ("partly", "already there"):
        process = command(folder, store)
        shown, errors = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, errors) == (1, "")
        assert state in shown and "without /acquisition/lick: its index is broken" in shown


def test_a_broken_table_of_units_is_named_and_the_rest_is_kept(client: Client, tmp_path: Path) -> None:
    folder, store = tmp_path / "in", tmp_path / "store"
    folder.mkdir()

    def fill(nwb: NWBFile) -> None:
        with_units([1.0, 2.0], [3.0])(nwb)
        running(np.arange(99.0) % 7, starting_time=0.0, rate=10.0)(nwb)

    path = write(folder, fill, "a.nwb")
    replace(path, "units/spike_times_index", np.array([2, 77]))
    (outcome,) = ingest_nwb(client, folder, store)
    assert outcome.state == "partly" and outcome.told.startswith(
        "as d1/a.zarr; without units: spike_times_index points"
    )
    assert [stream["name"] for stream in Store(store).entries[0]["streams"]] == ["running"]
    (row,) = failures(store)
    counts = row["coverage"]
    assert row["object"] == "units" and counts["used"] + counts["skipped"] == counts["objects"]


def test_a_refused_file_is_counted_object_by_object_where_it_can_be_read(client: Client, tmp_path: Path) -> None:
    folder, store = tmp_path / "in", tmp_path / "store"
    folder.mkdir()
    path = write(folder, lambda nwb: nwb.create_device("rig") and None, "a.nwb")
    (folder / "b.nwb").write_bytes(b"")
    with h5py.File(path) as file:
        objects = ["/"]
        file.visititems(lambda name, item: objects.append(name) if "neurodata_type" in item.attrs else None)
    assert states(ingest_nwb(client, folder, store)) == ["refused", "refused"]
    num_objects = len([name for name in objects if not name.startswith("specifications")])
    counts = [row["coverage"] for row in failures(store)]
    assert counts == [{"objects": num_objects, "used": counts[0]["used"], "skipped": counts[0]["skipped"]}, {}]
    assert counts[0]["used"] + counts[0]["skipped"] == num_objects


# ---------------------------------------------------------------- ids, and files of one session


def ingest_nwb(client: Client, folder: Path, store: Path, **recipe: Any) -> list[Outcome]:
    """One ingest of real NWB files into dataset d1."""
    files = find_files([folder], "d1", store, recipe.get("join"))
    return run_ingest(files, store, Recipe(**recipe), lambda: client, planner=plan_from_nwb)


IDS = {  # session_id in the file: where the session lies
    "697929_2024-02-22_08-38-30.json": "697929_2024-02-22_08-38-30.json",
    "/data/x/y.nwb": "data_x_y.nwb",
    "C:\\data\\y": "C_data_y",
    "": "recording",
    "x" * 300: "x" * 120,
    "Mäuse 1": "M_use_1",
    ".hidden": "hidden",
    "a.zarr": "a.zarr",
    "CON": "CON",
}


def test_a_session_of_any_id_lies_in_a_folder_of_its_own_and_is_found_again(client: Client, tmp_path: Path) -> None:
    folder, store = tmp_path / "in", tmp_path / "store"
    for number, session_id in enumerate(IDS):
        (folder / str(number)).mkdir(parents=True)
        write(folder / str(number), named(session_id), "recording.nwb")
    outcomes = ingest_nwb(client, folder, store)
    assert [outcome.reason for outcome in outcomes] == [f"as d1/{name}.zarr" for name in IDS.values()]
    assert problems(store) == []
    assert {path.name for path in tmp_path.iterdir()} == {"in", "store"}
    before = tree(store)
    assert set(states(ingest_nwb(client, folder, store))) == {"already there"}
    assert tree(store) == before


def test_ids_that_differ_only_where_a_folders_name_cannot_are_kept_apart(client: Client, tmp_path: Path) -> None:
    folder, store = tmp_path / "in", tmp_path / "store"
    folder.mkdir()
    for number, session_id in enumerate(("日本", "中国", "x" * 200, "x" * 201, "a/b", "a b")):
        write(folder, named(session_id), f"{number}.nwb")
    assert states(ingest_nwb(client, folder, store)) == ["ok"] * 6
    sessions = [Store(store).session(number) for number in range(6)]
    assert len({session.attributes["session_id"] for session in sessions}) == 6
    keys = [key for session in sessions for key in session.text("units/unit_key")]
    assert len(set(keys)) == len(keys) == 6
    assert problems(store) == []
    before = tree(store)
    assert set(states(ingest_nwb(client, folder, store))) == {"already there"}
    assert tree(store) == before


@pytest.mark.parametrize("session_id", ["..", "日本", "/", " "])
def test_an_id_without_a_letter_that_a_folder_can_have_gives_way_to_the_files_name(
    tmp_path: Path, session_id: str
) -> None:
    path = write(tmp_path, named(session_id), "mouse_7.nwb")
    assert plan_from_nwb((path,), Recipe(), "d1").session_id == "mouse_7"


def named(session_id: str) -> Callable[[NWBFile], None]:
    def fill(nwb: NWBFile) -> None:
        with_units([0.5, 9.0])(nwb)
        nwb.session_id = session_id

    return fill


JOIN = r"^(sub-[^_]+_ses-[^_]+)_"


def test_joined_files_are_one_session_of_two_sources(client: Client, tmp_path: Path) -> None:
    folder, store = tmp_path / "in", tmp_path / "store"
    folder.mkdir()
    write(folder, with_units([0.5, 9.0]), "sub-1_ses-2_ecephys.nwb")
    second = write(folder, running(np.arange(99.0) % 7, starting_time=0.0, rate=10.0), "sub-1_ses-2_behavior.nwb")
    write(folder, with_units([0.5, 9.0]), "sub-1_ses-3_ecephys.nwb")
    (first, other) = ingest_nwb(client, folder, store, join=JOIN)
    assert first.file == "sub-1_ses-2_behavior.nwb + sub-1_ses-2_ecephys.nwb"
    assert [first.told, other.told] == ["as d1/sub-1_ses-2.zarr", "as d1/sub-1_ses-3_ecephys.zarr"]
    entry = Store(store).entries[0]
    assert [source["file"] for source in entry["sources"]] == first.file.split(" + ")
    assert {stream["name"] for stream in entry["streams"]} == {"spikes", "running"}
    assert problems(store) == []
    before = tree(store)
    assert states(ingest_nwb(client, folder, store, join=JOIN)) == ["already there", "already there"]
    assert tree(store) == before
    write(folder, running(np.arange(99.0) % 5, starting_time=0.0, rate=10.0), second.name)
    assert states(ingest_nwb(client, folder, store, join=JOIN)) == ["ok", "already there"]
    assert tree(store) != before
    second.unlink()
    assert states(ingest_nwb(client, folder, store, join=JOIN)) == ["ok", "already there"]


# ---------------------------------------------------------------- many small sessions


def nobody() -> Client:
    raise AssertionError("workers were asked for, with nothing to do")


def test_nobody_is_asked_to_work_where_there_is_nothing_to_do(client: Client, tmp_path: Path) -> None:
    folder, store = recordings(tmp_path / "in", a="session=s1", b="session=s2 lost=a_lick"), tmp_path / "store"
    ingest(client, folder, store)
    before, files = tree(store), find_files([folder], "d1", store)
    again = run_ingest(files, store, FakeRecipe(), nobody, planner=fake_planner)
    assert states(again) == ["already there", "already there"] and tree(store) == before
    assert [outcome.num_streams for outcome in again] == [5, 5]
    (folder / "c.nwb").write_text("session=s3")
    with pytest.raises(AssertionError, match="with nothing to do"):
        run_ingest(find_files([folder], "d1", store), store, FakeRecipe(), nobody, planner=fake_planner)


def test_a_file_that_changed_and_kept_its_size_and_its_time_is_made_again(client: Client, tmp_path: Path) -> None:
    folder, store = recordings(tmp_path / "in", a="session=s1 seed=5", b="session=s2"), tmp_path / "store"
    ingest(client, folder, store)
    path, before = folder / "a.nwb", tree(store)
    found = path.stat()
    path.write_text("session=s1 seed=7")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (found.st_size, found.st_mtime_ns)
    assert states(ingest(client, folder, store)) == ["ok", "already there"]
    ingest(client, folder, tmp_path / "fresh")
    assert tree(store) == tree(tmp_path / "fresh") != before


def test_much_to_look_at_is_looked_at_by_the_workers(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {f"r{number}": f"session=s{number} seed={number}" for number in range(5)}
    folder, store = recordings(tmp_path / "in", **texts), tmp_path / "store"
    ingest(client, folder, store)
    (folder / "r1.nwb").write_text("session=s1 seed=8")  # as long as it was
    (folder / "r3.nwb").write_text("session=s3 seed=33")
    monkeypatch.setattr(prep.jobs, "LOOK_FILES", 2)
    assert states(ingest(client, folder, store)) == ["already there", "ok", "already there", "ok", "already there"]
    ingest(client, folder, tmp_path / "fresh")
    assert tree(store) == tree(tmp_path / "fresh")


def test_a_batch_ends_at_a_number_of_bytes_or_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prep.jobs, "LOOK_FILES", 3)
    monkeypatch.setattr(prep.jobs, "LOOK_BYTES", 10)
    sizes = [4, 6, 1, 1, 1, 1, 99, 1]
    found = prep.jobs.batched([look(size) for size in sizes])
    assert [[one[1][0].sources[0].bytes for one in batch] for batch in found] == [[4, 6], [1, 1, 1], [1], [99], [1]]
    assert prep.jobs.batched([]) == []


def look(num_bytes: int) -> prep.jobs.Look:
    file = InputFile((Path("/a.nwb"),), "a.nwb", "d1")
    source = Source(file="a.nwb", bytes=num_bytes, sha256="")
    sealed = Sealed(folder="", dataset_id="d1", sources=(source,), recipe_digest="", versions=(0, 0), entry={})
    return prep.jobs.Job(0, file, Outcome("a.nwb")), [sealed], lambda: None


def test_a_small_session_is_the_same_whether_one_task_writes_it_or_many(client: Client, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    path = write(folder, with_units([0.5, 9.0], [1.0]), "a.nwb")
    assert states(ingest_nwb(client, folder, tmp_path / "one")) == ["ok"]
    plan = plan_from_nwb((path,), Recipe(), "d1")
    assert prep.jobs.is_small(plan, (source_of(path),))
    write_plan(plan, target(tmp_path / "many", plan, Recipe().digest()))
    found = {name: digest for name, digest in tree(tmp_path / "one").items() if name != "catalog.json"}
    assert tree(tmp_path / "many") == found


def test_an_error_in_a_task_that_writes_a_whole_session_names_its_place(tmp_path: Path) -> None:
    (recording := tmp_path / "a.nwb").write_text("x")
    plan = replace_in_plan(session(recording, "s1", broken_at=50), stimuli=())
    place = target(tmp_path / "store", plan)
    runs = prep.jobs.shard_runs(plan)
    result = finish_task(Planned(place.sources, plan), place, "s1", None, runs)
    assert result == Failed("streams/spikes (/units), shard 1", "OSError: the disk is on fire")
    assert list((tmp_path / "store").glob("*/*.manifest.json")) == []
