"""Shards in memory: bounded by the limit of open files, checked once, shared by threads, forks and other processes.

In: hand-built stores. Out: nothing.
"""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from store_builders import build_store
from test_prep_store import read_all

from prep import catalog
from prep.disk import DigestError, StoreError
from prep.mapped import MAPPINGS
from prep.store import Store

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two sessions; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("mapped")
    (folder / "recording.nwb").write_text("a recording")
    build_store(folder / "store", folder / "recording.nwb", "s1", "s2")
    return folder / "store"


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "store"))


def copies(root: Path, count: int) -> None:
    """Sessions c000, c001, … in place of s2: the first one by hard links, each sealed by itself."""
    shutil.rmtree(root / "d1" / "s2.zarr")
    (root / "d1" / "s2.manifest.json").unlink()
    manifest = json.loads((root / "d1" / "s1.manifest.json").read_text())
    for number in range(count):
        name = f"c{number:03d}"
        shutil.copytree(root / "d1" / "s1.zarr", root / "d1" / f"{name}.zarr", copy_function=os.link)
        entry = {**manifest["session"], "session_id": name, "path": f"d1/{name}.zarr"}
        text = json.dumps({**manifest, "session": entry})
        (root / "d1" / f"{name}.manifest.json").write_text(text)
    catalog.write(root)


def in_a_clean_process(code: str, *args: object) -> str:
    """What a program prints that knows nothing of this one."""
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


FEW_FILES = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
import numpy as np
from prep.mapped import MAPPINGS
from prep.store import Store
store, held, most = Store(sys.argv[1]), [], 0
names = ("spikes", "roi", "running", "movie", "licks")
for _ in range(2):
    for index in range(len(store.entries)):
        held += [(name, store.session(index).stream(name).read(slice(0, 9))) for name in names]
        most = max(most, len(os.listdir("/proc/self/fd")))
for name, values in held:
    assert np.array_equal(values, held[names.index(name)][1], equal_nan=name in ("roi", "running", "licks"))
print(len(store.entries), len(MAPPINGS), most < 128, held[2][1].base is not None)
"""


def test_three_hundred_sessions_are_read_and_their_arrays_held_with_128_open_files(store: Path) -> None:
    copies(store, 299)
    assert in_a_clean_process(FEW_FILES, store).split() == ["300", "64", "True", "True"]


def test_an_array_stays_good_when_its_shard_is_let_go(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [Store(store).session(0).stream("roi").read(slice(k, k + 1)).copy() for k in range(125)]
    monkeypatch.setattr("prep.mapped.most_mappings", lambda: 1)
    rows = Store(store).session(0).stream("roi")
    held = [rows.read(slice(k, k + 1)) for k in range(125)]
    del rows
    for k in range(125):
        assert_array_equal(held[k], expected[k])


def test_a_store_that_is_gone_leaves_no_file_open(store: Path) -> None:
    before = len(MAPPINGS)
    opened = Store(store)
    values = opened.session(0).stream("running").read(slice(0, 9))
    assert len(MAPPINGS) == before + 1
    del opened
    assert len(MAPPINGS) == before + 1 and np.isfinite(values).any()
    del values
    assert len(MAPPINGS) == before


def flip(path: Path, place: int) -> None:
    """Change one byte in place: the file stays the same file."""
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 16]))


def test_a_chunk_is_checked_once_though_its_session_and_its_shard_are_closed_in_between(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prep.store.SESSION_BYTES", 0)
    monkeypatch.setattr("prep.mapped.most_mappings", lambda: 1)
    opened, shard = Store(store), store / "d1/s1.zarr/streams/running/values/c/0/0/0"
    before = opened.session(0).stream("running").read(slice(0, 1)).copy()
    first = opened.session(0)
    opened.session(1).stream("running").read(slice(0, 1))
    assert opened.session(0) is not first
    flip(shard, 2)  # of a number that was checked …
    flip(shard, 20 * 4 + 2)  # … and of the chunk behind it, that was not
    assert opened.session(0).stream("running").read(slice(0, 1)) != before
    with pytest.raises(DigestError, match=r"running/values/c/0/0/0: chunk 1 is damaged"):
        opened.session(0).stream("running").read(slice(0, 21))
    with pytest.raises(DigestError, match=r"running/values/c/0/0/0: chunk 0 is damaged"):
        Store(store).session(0).stream("running").read(slice(0, 1))


def test_the_reader_names_the_file_of_every_byte_that_was_changed(store: Path) -> None:
    groups = {"units", "streams", "intervals", "splits", "trials"} | {
        f"{path.stem}.zarr" for path in store.glob("stimuli/*.zarr")
    }
    unread = {"failed.jsonl", ".lock"}
    files = [
        path
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.name not in unread and not (path.name == "zarr.json" and path.parent.name in groups)
    ]
    rng = np.random.default_rng(0)
    for number in range(100):
        path = files[int(rng.integers(len(files)))] if number >= len(files) else files[number]
        place = int(rng.integers(path.stat().st_size))
        flip(path, place)
        with pytest.raises(StoreError, match=re.escape(str(path))):
            read_all(Store(store))
        flip(path, place)
    read_all(Store(store))


# ---------------------------------------------------------------- other processes, other threads


def test_a_store_travels_to_another_process_by_its_address_alone(store: Path) -> None:
    opened = Store(store)
    expected = read_all(opened)
    text = pickle.dumps(opened)
    assert len(text) < 500
    for ours, theirs in zip(expected, read_all(pickle.loads(text)), strict=True):
        assert_array_equal(ours, theirs)
    session = pickle.loads(pickle.dumps(opened.session(0)))
    assert_array_equal(session.stream("roi").read(slice(0, 125)), opened.session(0).stream("roi").read(slice(0, 125)))


def test_a_fork_reads_on_while_a_thread_of_its_parent_is_opening_a_shard(store: Path) -> None:
    opened = Store(store)
    rows = opened.session(0).stream("running")
    expected = rows.read(slice(0, 125)).copy()
    forked = Store(store).session(0).stream("running")
    assert_array_equal(forked.read(slice(0, 9)), expected[:9])
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with MAPPINGS._lock:
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(30)
    child = os.fork()
    if not child:
        signal.alarm(20)
        os._exit(0 if np.array_equal(forked.read(slice(0, 125)), expected, equal_nan=True) else 1)
    leave.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


def test_threads_that_share_a_store_read_the_same_though_all_is_let_go_at_once(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("spikes", "roi", "running", "movie")
    expected = {(i, n): Store(store).session(i).stream(n).read(slice(0, 60)).copy() for i in (0, 1) for n in names}
    monkeypatch.setattr("prep.store.SESSION_BYTES", 0)
    monkeypatch.setattr("prep.mapped.most_mappings", lambda: 2)
    opened = Store(store)

    def read(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        for _ in range(200):
            index, name, start = int(rng.integers(2)), names[int(rng.integers(4))], int(rng.integers(59))
            values = opened.session(index).stream(name).read(slice(start, start + 1))
            assert_array_equal(values, expected[index, name][start : start + 1])
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))


LEAN = """
import sys
from prep.store import Store
store = Store(sys.argv[1])
session = store.session(0)
for name in session.stream_names:
    session.stream(name).read(slice(0, 9))
heavy = {"zarr", "dask", "distributed", "pynwb", "h5py", "fsspec", "scipy", "torch"}
print(sorted(heavy & set(sys.modules)))
"""


def test_reading_a_store_needs_no_zarr_no_dask_and_no_nwb(store: Path) -> None:
    assert in_a_clean_process(LEAN, store) == "[]\n"
