"""A store far away, read through the cache: the same values, fetched once, checked on arrival, within its bound.

In: hand-built stores on fsspec's memory:// and file:// and an HTTP server on loopback. Out: nothing.
"""

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from numpy.testing import assert_array_equal
from store_builders import build_store
from test_prep_store import read_all

import prep.cache
from prep.cache import CachedFiles, cache_folder
from prep.disk import DigestError, StoreError
from prep.store import Store

ROOT = Path(__file__).parent.parent
URL = "memory://bucket/store"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two sessions."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "recording.nwb").write_text("a recording")
    build_store(folder / "store", folder / "recording.nwb", "s1", "s2")
    return folder / "store"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test, and no pauses between attempts."""
    monkeypatch.setenv("BRAINLOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prep.cache, "PAUSE_S", 0.0)
    return tmp_path / "cache"


def upload(local: Path, url: str) -> None:
    """Copy every file of a store."""
    for path in local.rglob("*"):
        if path.is_file():
            fsspec.filesystem("memory").pipe_file(f"{url}/{path.relative_to(local)}", path.read_bytes())


@pytest.fixture
def bucket(local: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The store at URL; the names of the files that were fetched from it, one after the other."""
    upload(local, URL)
    fetched: list[str] = []
    get_file, cat_file = MemoryFileSystem.get_file, MemoryFileSystem.cat_file

    def get(self: Any, path: str, target: str, **more: Any) -> None:
        fetched.append(path.removeprefix("/bucket/store/"))
        get_file(self, path, target, **more)

    def cat(self: Any, path: str, **more: Any) -> Any:
        fetched.append(path.removeprefix("/bucket/store/"))
        return cat_file(self, path, **more)

    monkeypatch.setattr(MemoryFileSystem, "get_file", get)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat)
    yield fetched
    MemoryFileSystem.store.clear()


def same(opened: Store, local: Path) -> None:
    """All values are those of the local store."""
    for ours, theirs in zip(read_all(opened), read_all(Store(local)), strict=True):
        assert_array_equal(ours, theirs)


def kept(cache: Path) -> list[Path]:
    """The files in the cache."""
    return sorted(path for path in cache.glob("??/*") if path.is_file() and not path.name.startswith("."))


def test_a_store_at_a_url_reads_as_the_local_one_and_each_file_is_fetched_once(bucket: list[str], local: Path) -> None:
    same(Store(URL), local)
    same(Store(f"{URL}/"), local)
    assert bucket.count("catalog.json") == 2
    sealed = [name for name in bucket if name != "catalog.json"]
    assert len(set(sealed)) == len(sealed)
    assert Store(URL).digest() == Store(local).digest()
    assert Store(URL).address == URL


def test_files_are_named_by_their_digests_so_that_two_stores_share_them(
    bucket: list[str], local: Path, cache: Path
) -> None:
    same(Store(URL), local)
    upload(local, "memory://other")
    before = len(bucket)
    same(Store("memory://other"), local)
    assert bucket[before:] == ["/other/catalog.json"]
    assert all(prep.cache.sha256(path) == path.name for path in kept(cache))


def test_only_what_is_read_is_fetched_the_manifest_first(bucket: list[str]) -> None:
    stream = Store(URL).session(0).stream("spikes")
    assert bucket[:3] == ["catalog.json", "d1/s1.manifest.json", "d1/s1.zarr/streams/spikes/zarr.json"]
    assert all("/spikes/" in name for name in bucket[2:]) and not any("/values/c/" in name for name in bucket)
    before = len(bucket)
    stream.read(slice(0, 9))
    assert [name.removeprefix("d1/s1.zarr/streams/spikes/values/") for name in bucket[before:]] == [
        "digests/0",
        "c/0/0/0",
    ]


def test_the_cache_stays_within_its_bound_and_what_was_used_last_stays(
    bucket: list[str], local: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRAINLOOM_CACHE_GB", "0.00002")
    opened = Store(URL)
    sizes = []
    for index in (0, 1):
        for name in opened.session(index).stream_names:
            opened.session(index).stream(name).read(slice(0, 9))
            sizes.append(sum(path.stat().st_size for path in kept(cache)))
    assert 10_000 < max(sizes) <= 20_000
    assert len({name for name in bucket if "manifest" in name}) == 2
    same(opened, local)
    last = max(kept(cache), key=lambda path: path.stat().st_mtime_ns)
    assert prep.cache.sha256(last) == last.name


def test_of_two_files_the_one_that_was_used_longer_ago_goes(bucket: list[str], cache: Path) -> None:
    contents = [bytes([number]) * 400 for number in range(3)]
    entries = [{"bytes": 400, "sha256": prep.cache.hashlib.sha256(content).hexdigest()} for content in contents]
    for number, content in enumerate(contents):
        fsspec.filesystem("memory").pipe_file(f"{URL}/{number}", content)
    files = CachedFiles(URL, cache, 1000)
    for number in (0, 1, 0, 2):
        with files.open(str(number), entries[number]) as file:
            assert file.read() == contents[number]
        time.sleep(0.02)
    assert bucket == ["0", "1", "2"]
    assert {path.name for path in kept(cache)} == {entries[0]["sha256"], entries[2]["sha256"]}


def test_an_array_stays_good_when_its_file_is_evicted(bucket: list[str], local: Path, cache: Path) -> None:
    rows = Store(URL).session(0).stream("roi")
    values = rows.read(slice(0, 9))
    for path in kept(cache):
        path.unlink()
    assert_array_equal(values, Store(local).session(0).stream("roi").read(slice(0, 9)))
    assert_array_equal(rows.read(slice(0, 125)), Store(local).session(0).stream("roi").read(slice(0, 125)))


def far(name: str) -> str:
    """Where fsspec keeps it."""
    return f"/bucket/store/{name}"


SHARD = "d1/s1.zarr/streams/running/values/c/0/0/0"


def test_a_file_that_arrives_damaged_is_fetched_once_more_then_refused_and_not_kept(
    bucket: list[str], cache: Path
) -> None:
    file = MemoryFileSystem.store[far(SHARD)]
    content = file.getvalue()
    file.seek(0)
    file.write(bytes([content[0] ^ 1]))
    rows = Store(URL).session(0).stream("running")
    with pytest.raises(DigestError) as refused:
        rows.read(slice(0, 9))
    assert re.fullmatch(
        rf"{URL}/{SHARD} arrived damaged: its sha256 is [0-9a-f]{{64}}, its manifest says [0-9a-f]{{64}}\. "
        r"Run `make verify` where the store was made, and publish it again\.",
        str(refused.value),
    )
    assert bucket.count(SHARD) == 2
    assert all(prep.cache.sha256(path) == path.name for path in kept(cache))


@pytest.mark.parametrize("name", [SHARD, "d1/s1.zarr/streams/running/start_ns/c/0", "d1/s1.manifest.json"])
@pytest.mark.parametrize("cut", [False, True])
def test_a_copy_that_was_damaged_in_the_cache_is_fetched_again(
    name: str, cut: bool, bucket: list[str], local: Path, cache: Path
) -> None:
    Store(URL).session(0).stream("running").read(slice(0, 9))
    digest = prep.cache.sha256(local / name)
    copy = cache / digest[:2] / digest
    content = copy.read_bytes()
    copy.write_bytes(content[:-1] if cut else bytes([content[0] ^ 1]) + content[1:])
    expected = Store(local).session(0).stream("running").read(slice(0, 9))
    assert_array_equal(Store(URL).session(0).stream("running").read(slice(0, 9)), expected)
    assert copy.read_bytes() == content and bucket.count(name) == 2


def test_a_transfer_that_fails_is_tried_again(bucket: list[str], local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works, calls = MemoryFileSystem.get_file, []

    def fails_at_first(self: Any, path: str, target: str, **more: Any) -> None:
        calls.append(path)
        if len(calls) % 4:
            raise ConnectionError("reset by peer")
        works(self, path, target, **more)

    monkeypatch.setattr(MemoryFileSystem, "get_file", fails_at_first)
    same(Store(URL), local)


@pytest.mark.parametrize(("error", "attempts"), [(ConnectionError("reset by peer"), 4), (PermissionError("no"), 1)])
def test_what_cannot_be_fetched_is_named_with_the_remedy(
    error: Exception, attempts: int, bucket: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fails(self: Any, path: str, target: str, **more: Any) -> None:
        calls.append(path)
        raise error

    opened = Store(URL)
    monkeypatch.setattr(MemoryFileSystem, "get_file", fails)
    with pytest.raises(StoreError) as refused:
        opened.session(0)
    assert str(refused.value) == (
        f"{URL}/d1/s1.manifest.json cannot be fetched ({type(error).__name__}: {error}). Check the address, the "
        "network and the credentials (of s3:// the AWS_… variables; FSSPEC_S3_ANON=true for none)."
    )
    assert len(calls) == attempts


def test_a_full_disk_is_named_with_the_remedy(bucket: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Store(URL)

    def full(self: Any, path: str, target: str, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MemoryFileSystem, "get_file", full)
    with pytest.raises(StoreError) as refused:
        opened.session(0)
    assert str(refused.value) == (
        f"The cache {cache} cannot be used ([Errno 28] No space left on device). Free some disk, or set "
        "BRAINLOOM_CACHE to another folder or BRAINLOOM_CACHE_GB to less than 64."
    )
    assert kept(cache) == []


def test_a_cache_that_is_no_folder_is_named(bucket: list[str], cache: Path) -> None:
    cache.write_text("a file")
    with pytest.raises(
        StoreError, match=rf"^The cache {cache} cannot be used \(\[Errno \d+\] Not a directory: .*Free some"
    ):
        Store(URL).session(0)


def test_a_url_that_holds_no_store_is_named(bucket: list[str]) -> None:
    with pytest.raises(StoreError) as refused:
        Store("memory://nowhere")
    assert str(refused.value) == (
        "memory://nowhere/catalog.json is missing. Is this a token store? "
        "Run `make prep SRC=… OUT=memory://nowhere` to make one."
    )


def test_a_protocol_that_is_none_is_named() -> None:
    with pytest.raises(
        StoreError, match=r"nope://x/catalog\.json: Protocol not known: nope.* A store is a folder, or a"
    ):
        Store("nope://x")


@pytest.mark.parametrize("text", ["many", "-1", "1e3"])
def test_a_bound_that_is_no_number_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINLOOM_CACHE_GB", text)
    with pytest.raises(StoreError) as refused:
        Store(URL)
    assert str(refused.value) == (
        f"BRAINLOOM_CACHE_GB={text!r} is no size. Give a number of gigabytes, for instance BRAINLOOM_CACHE_GB=200."
    )


def test_a_digest_that_would_become_a_path_is_refused(cache: Path) -> None:
    files = CachedFiles(URL, cache, 1000)
    with pytest.raises(DigestError, match=r"'\.\./\.\./x' in its manifest is no sha256"):
        files.open("d1/x", {"sha256": "../../x"})


def test_without_a_word_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BRAINLOOM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/brainloom")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/her")
    assert cache_folder() == Path("/home/her/.cache/brainloom")


def test_what_a_killed_process_left_half_written_is_swept_when_it_is_old(bucket: list[str], cache: Path) -> None:
    old, new = cache / "ab" / ".abc.x1", cache / "ab" / ".abc.x2"
    old.parent.mkdir(parents=True)
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (0, 0))
    Store(URL).session(0)
    assert not old.exists() and new.exists()


READ = """
import sys
import numpy as np
from prep.store import Store
there, here = Store(sys.argv[1]), Store(sys.argv[2])
for turn in range(3):
    for index in (0, 1):
        for name in here.session(index).stream_names:
            count = here.session(index).stream(name).spec.num_tokens
            theirs, ours = (Store(at).session(index).stream(name).read(slice(0, count)) for at in sys.argv[1:])
            assert np.array_equal(theirs, ours, equal_nan=ours.dtype.kind == "f"), name
print("the same")
"""


def test_processes_that_share_a_cache_which_is_too_small_read_the_same(local: Path, cache: Path) -> None:
    environment = {**os.environ, "BRAINLOOM_CACHE_GB": "0.00001"}
    command = [sys.executable, "-c", READ, f"file://{local}", str(local)]
    readers = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    told = [reader.communicate(timeout=120) for reader in readers]
    assert told == [("the same\n", "")] * 4
    assert all(prep.cache.sha256(path) == path.name for path in kept(cache))


def test_a_file_that_many_threads_want_at_once_is_fetched_once(bucket: list[str], local: Path) -> None:
    opened = [Store(URL) for _ in range(8)]
    barrier = threading.Barrier(8)

    def read(store: Store) -> None:
        barrier.wait()
        store.session(0)

    threads = [threading.Thread(target=read, args=(store,)) for store in opened]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bucket.count("d1/s1.manifest.json") == 1


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and says nothing."""

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def test_a_store_behind_http_reads_as_the_local_one(local: Path, tmp_path: Path) -> None:
    served = Path(shutil.copytree(local, tmp_path / "served"))
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{served.name}"
        same(Store(url), local)
        with pytest.raises(StoreError, match=rf"{url}x/catalog\.json is missing\. Is this a token store"):
            Store(f"{url}x")
        server.shutdown()
