"""Ingest: resumable, deterministic, and one bad file stops nobody else.

In: little text files that stand for recordings (store_builders.fake_planner). Out: stores in temporary folders.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client
from processes import below, is_alive, wait_for
from store_builders import FakeRecipe, fake_planner, read_bytes_of, session, target, tree, write_plan

from prep.__main__ import main
from prep.disk import StoreError, locked
from prep.files import find_files
from prep.ingest import connect, run_ingest
from prep.ingest_report import Outcome
from prep.plan import PrepError
from prep.settings import FORMAT_VERSION
from prep.store import Store
from prep.tasks import plan_from_nwb
from prep.verify import verify
from prep.write_session import check, session_folder

ROOT = Path(__file__).parent.parent
RECORDINGS = Path(os.environ.get("BRAINLOOM_NWB_DIR", ROOT.parent / "shared" / "nwb"))
PATIENCE_S = 60
CLI = """
import sys
import prep.ingest
from prep.__main__ import main
from store_builders import fake_planner
prep.ingest.plan_from_nwb = fake_planner
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with connect(None, 2) as connected:
        yield connected


def recordings(folder: Path, **texts: str) -> Path:
    """A folder of stand-ins for recordings, one file per keyword."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.nwb").write_text(text)
    return folder


def ingest(client: Client, folder: Path, store: Path, recipe: str = "") -> list[Outcome]:
    """One ingest of a folder into dataset d1."""
    return run_ingest(
        find_files([folder], "d1", store), store, FakeRecipe(recipe), lambda: client, planner=fake_planner
    )


def states(outcomes: list[Outcome]) -> list[str]:
    """What became of each file."""
    return [outcome.state for outcome in outcomes]


def problems(store: Path) -> list[str]:
    """All that verify finds."""
    return [problem for row in verify(store) for problem in row.problems]


def failures(store: Path) -> list[dict[str, Any]]:
    """The lines of failed.jsonl."""
    path = store / "failed.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_store_is_the_same_whoever_writes_it(client: Client, tmp_path: Path) -> None:
    folder = recordings(tmp_path / "in", a="session=s1", b="session=s2 seed=7", c="session=s3 seed=9")
    assert states(ingest(client, folder, tmp_path / "two")) == ["ok", "ok", "ok"]
    with connect(None, 1) as alone:
        ingest(alone, folder, tmp_path / "one")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert problems(tmp_path / "two") == []
    plan = session(folder / "a.nwb", "s1")
    write_plan(plan, target(tmp_path / "here", plan, recipe_digest=FakeRecipe().digest()))
    here = {name: digest for name, digest in tree(tmp_path / "here").items() if name.startswith("d1/")}
    assert here.items() <= tree(tmp_path / "two").items()


def test_nothing_of_this_machine_is_in_the_store(client: Client, tmp_path: Path) -> None:
    folder = recordings(tmp_path / "in", a="session=s1")
    ingest(client, folder, tmp_path / "store")
    content = read_bytes_of(tmp_path / "store")
    assert str(tmp_path).encode() not in content and os.uname().nodename.encode() not in content


def test_a_second_run_skips_what_is_done_and_does_what_changed(client: Client, tmp_path: Path) -> None:
    folder, store = recordings(tmp_path / "in", a="session=s1", b="session=s2"), tmp_path / "store"
    ingest(client, folder, store)
    before = tree(store)
    assert states(ingest(client, folder, store)) == ["already there", "already there"]
    assert tree(store) == before
    recordings(folder, b="session=s2 seed=5")
    assert states(ingest(client, folder, store)) == ["already there", "ok"]
    assert len(Store(store).entries) == 2
    assert states(ingest(client, folder, store, recipe="another")) == ["ok", "ok"]
    ingest(client, folder, tmp_path / "fresh", recipe="another")
    assert tree(store) == tree(tmp_path / "fresh")


def test_a_bad_file_among_good_ones_is_named_and_stops_nobody(client: Client, tmp_path: Path) -> None:
    folder = recordings(
        tmp_path / "in",
        a="session=s1",
        b="refuse=no_spikes_here",
        c="session=s3 broken_at=50",
        d="session=s4",
        e="junk",
    )
    outcomes = ingest(client, folder, tmp_path / "store")
    assert states(outcomes) == ["ok", "refused", "failed", "ok", "refused"]
    assert outcomes[1].reason == "no spikes here"
    assert outcomes[2].object == "streams/spikes (/units), shard 1"
    assert outcomes[2].reason == "OSError: the disk is on fire"
    listed = [json.loads(line) for line in (tmp_path / "store" / "failed.jsonl").read_text().splitlines()]
    assert [(row["file"], row["object"]) for row in listed] == [
        ("b.nwb", ""),
        ("c.nwb", "streams/spikes (/units), shard 1"),
        ("e.nwb", ""),
    ]
    assert [entry["session_id"] for entry in Store(tmp_path / "store").entries] == ["s1", "s4"]
    assert problems(tmp_path / "store") == []
    recordings(folder, b="session=s2", c="session=s3", e="session=s5")
    assert states(ingest(client, folder, tmp_path / "store")) == ["already there", "ok", "ok", "already there", "ok"]
    assert not (tmp_path / "store" / "failed.jsonl").exists()


def test_two_files_of_one_session_get_two_names_by_order_of_path(client: Client, tmp_path: Path) -> None:
    folder = recordings(tmp_path / "in", a="session=s1", b="session=s1 seed=4", c="session=s1 seed=5")
    (folder / "sub").mkdir()
    (folder / "sub" / "a.nwb").write_text("session=s1")  # the very same file again
    assert states(ingest(client, folder, tmp_path / "store")) == ["ok", "ok", "ok", "already there"]
    store = Store(tmp_path / "store")
    names = [entry["session_id"] for entry in store.entries]
    assert names[0] == "s1" and all(name.startswith("s1-") and len(name) == 11 for name in names[1:])
    assert store.session(0).attributes["sources"][0]["file"] == "a.nwb"
    keys = [key for index in range(3) for key in store.session(index).text("units/unit_key")]
    assert len(set(keys)) == 15
    before = tree(tmp_path / "store")
    assert states(ingest(client, folder, tmp_path / "store")) == ["already there"] * 4
    assert tree(tmp_path / "store") == before


def test_pixels_that_two_sessions_share_are_written_once(client: Client, tmp_path: Path) -> None:
    folder = recordings(tmp_path / "in", a="session=s1", b="session=s2")
    ingest(client, folder, tmp_path / "store")
    store = Store(tmp_path / "store")
    digests = {store.session(index).stream("movie").spec.stimulus for index in range(2)}
    assert digests == set(store.catalog["stimuli"]) and len(digests) == 1


@pytest.mark.parametrize("name", ["../../escape", "/etc/passwd", "..", "a/b", ""])
def test_a_session_stays_inside_the_store_whatever_its_name(name: str, tmp_path: Path) -> None:
    recording = tmp_path / "r.nwb"
    recording.write_text("x")
    plan = session(recording, name, dataset_id="../d")
    write_plan(plan, target(tmp_path / "store", plan))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.nwb", "store"]
    manifests = list((tmp_path / "store").glob("*/*.manifest.json"))
    assert sorted(path.parent.name for path in manifests) == ["d", "stimuli"]


def test_a_dataset_named_like_a_part_of_the_store_gets_another_folder(tmp_path: Path) -> None:
    plan = session(tmp_path, "s1", dataset_id="stimuli")
    assert session_folder(plan.dataset_id, plan.session_id) == "stimuli_/s1.zarr"


def test_a_stream_name_that_is_no_folder_name_is_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    plan = session(tmp_path, "s1")
    spec = replace(plan.streams[0].spec, name="../up")
    with pytest.raises(PrepError, match=r"'\.\./up' is no safe name"):
        check(replace(plan, streams=(replace(plan.streams[0], spec=spec),)))


def test_a_folder_with_other_things_in_it_is_no_store(client: Client, tmp_path: Path) -> None:
    folder = recordings(tmp_path / "in", a="session=s1")
    with pytest.raises(StoreError, match=r"neither empty nor a token store"):
        ingest(client, folder, folder)


def test_a_store_of_another_version_is_not_touched(client: Client, tmp_path: Path) -> None:
    folder = recordings(tmp_path / "in", a="session=s1")
    ingest(client, folder, tmp_path / "store")
    manifest = tmp_path / "store" / "d1" / "s1.manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"format": {FORMAT_VERSION}', '"format": 99'))
    before = tree(tmp_path / "store")
    with pytest.raises(StoreError, match="is format version 99"):
        ingest(client, folder, tmp_path / "store")
    assert tree(tmp_path / "store") == before


def test_files_are_found_in_folders_once_and_in_order(tmp_path: Path) -> None:
    folder = recordings(tmp_path / "data", b="", a="")
    recordings(folder / "deep" / "er", c="")
    recordings(folder / "zarr.nwb.zarr", inner="")
    (folder / "notes.txt").write_text("")
    found = find_files([folder, folder / "a.nwb"], None, tmp_path / "out")
    assert [file.label for file in found] == ["a.nwb", "b.nwb", "deep/er/c.nwb", "zarr.nwb.zarr"]
    assert [file.paths for file in found] == [(folder / file.label,) for file in found]
    assert {file.dataset_id for file in found} == {"data"}
    assert find_files([folder / "a.nwb"], "mine", tmp_path)[0].dataset_id == "mine"
    with pytest.raises(StoreError, match="does not exist"):
        find_files([tmp_path / "nope"], None, tmp_path)
    (tmp_path / "void").mkdir()
    with pytest.raises(StoreError, match="holds no NWB file"):
        find_files([tmp_path / "void"], None, tmp_path)


# ---------------------------------------------------------------- the command


def command(folder: Path, store: Path) -> "subprocess.Popen[str]":
    """`python -m prep ingest` in a process of its own, with the stand-in planner."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    words = ["-c", CLI, "ingest", str(folder), "--out", str(store), "--workers", "2", "--dataset", "d1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-W", "error", *words], env=environment, cwd=ROOT, **pipes)


def test_killed_in_the_middle_it_leaves_no_writer_and_the_next_run_ends_with_the_same_bytes(
    client: Client, tmp_path: Path
) -> None:
    folder, store = recordings(tmp_path / "in", a="session=s1", b="session=s2 slow_s=0.8"), tmp_path / "store"
    process = command(folder, store)
    half_way = ".s2.*.partial.zarr/streams/spikes/values/c/1/0/0"
    wait_for(
        lambda: (store / "d1" / "s1.manifest.json").exists() and any((store / "d1").glob(half_way)),
        "half a file",
        PATIENCE_S,
    )
    workers = list(below(process.pid))
    process.kill()
    process.communicate()
    assert len(workers) >= 2
    wait_for(lambda: not any(is_alive(pid) for pid in workers), "the workers' end", PATIENCE_S)
    assert not (store / "catalog.json").exists() and not (store / "d1" / "s2.manifest.json").exists()
    assert states(ingest_real_recipe(client, folder, store)) == ["already there", "ok"]
    ingest_real_recipe(client, folder, tmp_path / "fresh")
    assert tree(store) == tree(tmp_path / "fresh")


def ingest_real_recipe(client: Client, folder: Path, store: Path) -> list[Outcome]:
    """As the command does it: with the default recipe."""
    import prep.recipe

    return run_ingest(
        find_files([folder], "d1", store), store, prep.recipe.load(None), lambda: client, planner=fake_planner
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_asked_to_stop_it_says_how_to_go_on(tmp_path: Path) -> None:
    folder, store = recordings(tmp_path / "in", a="session=s1 slow_s=0.5"), tmp_path / "store"
    process = command(folder, store)
    wait_for(lambda: any(store.glob("d1/.s1.*.partial.zarr/streams")), "a first stream", PATIENCE_S)
    workers = list(below(process.pid))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert errors.strip() == "Interrupted: what is sealed stays. Run the same command again to go on."
    wait_for(lambda: not any(is_alive(pid) for pid in workers), "the workers' end", PATIENCE_S)


def test_the_command_ends_with_a_table_and_exit_code_one_where_a_file_failed(tmp_path: Path) -> None:
    folder, store = recordings(tmp_path / "in", a="session=s1", b="refuse=no_spikes_here"), tmp_path / "store"
    process = command(folder, store)
    shown, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert errors == ""
    assert (
        "no spikes here" in shown and "as d1/s1.zarr" in shown and "1 of 2 files are in the store, 1 refused." in shown
    )


def test_leftovers_of_dead_runs_are_swept_and_those_of_live_ones_stay(tmp_path: Path) -> None:
    from prep.runs import run_of_its_own

    store = tmp_path / "store"
    with run_of_its_own(store) as alive:
        for run in (alive, "dead"):
            (store / "d1" / f".s1.{run}.partial.zarr").mkdir(parents=True)
        with run_of_its_own(store):
            assert [path.name for path in (store / "d1").iterdir()] == [f".s1.{alive}.partial.zarr"]
    assert list((store / "d1").iterdir()) == [] and list((store / ".runs").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ingest", "/nope", "--out", "x"], "/nope does not exist"),
        (["ingest", "/nope", "--out", "x", "--workers", "0"], "at least one worker"),
        (["ingest", "/nope", "--out", "x", "--recipe", "/nope.yaml"], "/nope.yaml"),
    ],
)
def test_a_persons_mistake_is_one_message_and_exit_code_two(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--help"], ["ingest", "--help"], ["verify", "--help"]])
def test_every_command_explains_itself(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(words)
    assert leaving.value.code == (0 if words else 2)


def test_the_catalog_waits_for_its_lock(tmp_path: Path) -> None:
    import threading

    import prep.catalog

    with locked(tmp_path):
        writer = threading.Thread(target=prep.catalog.write, args=(tmp_path,))
        writer.start()
        time.sleep(0.1)
        assert not (tmp_path / "catalog.json").exists()
    writer.join(PATIENCE_S)
    assert Store(tmp_path).entries == []


def test_what_is_damaged_is_mended_by_the_remedy_that_verify_names(client: Client, tmp_path: Path) -> None:
    folder, store = recordings(tmp_path / "in", a="session=s1", b="session=s2"), tmp_path / "store"
    ingest(client, folder, store)
    good = tree(store)
    (store / "d1" / "s1.zarr" / "streams" / "roi" / "values" / "c" / "0" / "0" / "0").unlink()
    assert states(ingest(client, folder, store)) == ["ok", "already there"]  # what is gone is seen without being told
    assert tree(store) == good
    shard = store / "d1" / "s2.zarr" / "streams" / "roi" / "values" / "c" / "0" / "0" / "0"
    shard.write_bytes(b"x" * shard.stat().st_size)
    for manifest in (store / "d1" / "s2.manifest.json", next((store / "stimuli").glob("*.manifest.json"))):
        manifest.unlink()
        ingest(client, folder, store)
        assert tree(store) == good
    for texts in (("{", "[]"), ("{}", '{"files": {}, "session": {}}')):
        for name, text in zip(("s1", "s2"), texts, strict=True):
            (store / "d1" / f"{name}.manifest.json").write_text(text)
        assert states(ingest(client, folder, store)) == ["ok", "ok"]
        assert tree(store) == good


@pytest.mark.slow
def test_a_shard_that_kills_its_worker_fails_its_own_session_only(client: Client, tmp_path: Path) -> None:
    folder = recordings(tmp_path / "in", a="session=s1", b="session=s2 deadly_at=50", c="session=s3 slow_s=0.1")
    outcomes = ingest(client, folder, tmp_path / "store")
    assert states(outcomes) == ["ok", "failed", "ok"]
    assert outcomes[1].object == "streams/spikes (/units), shard 1"
    assert "want of memory" in outcomes[1].reason
    assert problems(tmp_path / "store") == []


@pytest.mark.skipif(not RECORDINGS.is_dir(), reason=f"no recordings at {RECORDINGS} (set BRAINLOOM_NWB_DIR)")
def test_real_recordings_are_ingested_or_refused_with_one_line(client: Client, tmp_path: Path) -> None:
    import prep.recipe

    store = tmp_path / "store"
    files = find_files([RECORDINGS], None, store)
    outcomes = run_ingest(files, store, prep.recipe.load(None), lambda: client, planner=plan_from_nwb)
    assert set(states(outcomes)) == {"ok", "partly", "refused"}
    assert sum(not outcome.is_missing for outcome in outcomes) >= 11
    assert [outcome.file for outcome in outcomes if outcome.refused] == ["allen_layout_truncated.nwb"]
    assert all(row["coverage"]["objects"] for row in failures(store) if row["file"] != "empty.nwb")
    assert all(re.match(r"\w+(Error|Exception)\b", row.reason) is None for row in outcomes if row.is_failure)
    assert problems(store) == []
    peaks = client.run(peak_rss_mb)
    assert all(100 < peak < 700 for peak in peaks.values()), peaks


def peak_rss_mb() -> float:
    """Of a worker, since it started."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) / 1024
