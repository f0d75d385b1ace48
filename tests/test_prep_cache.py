"""A store far away, read through the cache: the same values, fetched once, checked on arrival, within its bound.

In: hand-built stores on a web server on loopback. Out: nothing.
"""

import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import remote_builders
from numpy.testing import assert_array_equal
from remote_builders import Handler, Served
from store_builders import build_store
from test_prep_store import read_all

import prep.cache
from prep.cache import CachedFiles, cache_folder
from prep.disk import DigestError, StoreError
from prep.store import Store

ROOT = Path(__file__).parent.parent

nothing_of_this_machine = pytest.fixture(autouse=True)(remote_builders.nothing_of_this_machine)
web = pytest.fixture(remote_builders.web_server)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two sessions."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "recording.nwb").write_text("a recording")
    build_store(folder / "store", folder / "recording.nwb", "s1", "s2")
    return folder / "store"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test."""
    monkeypatch.setenv("BRAINLOOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@dataclass
class Bucket:
    """A store on a server."""

    url: str
    handler: type[Handler]

    @property
    def fetched(self) -> list[str]:
        """The names of the files that were fetched from it, one after the other."""
        return [path.removeprefix("/store/") for path, _ in self.handler.requests]

    def put(self, name: str, content: bytes) -> None:
        self.handler.files[f"/store/{name}"] = Served(content)

    def bytes_of(self, name: str) -> bytes:
        return self.handler.files[f"/store/{name}"].content


def upload(local: Path, handler: type[Handler], folder: str) -> None:
    """Copy every file of a store."""
    for path in local.rglob("*"):
        if path.is_file():
            handler.files[f"/{folder}/{path.relative_to(local)}"] = Served(path.read_bytes())


@pytest.fixture
def bucket(local: Path, web: tuple[str, type[Handler]]) -> Bucket:
    """The store at a URL."""
    address, handler = web
    upload(local, handler, "store")
    return Bucket(f"{address}/store", handler)


def same(opened: Store, local: Path) -> None:
    """All values are those of the local store."""
    for ours, theirs in zip(read_all(opened), read_all(Store(local)), strict=True):
        assert_array_equal(ours, theirs)


def kept(cache: Path) -> list[Path]:
    """The files in the cache."""
    return sorted(path for path in cache.glob("??/*") if path.is_file() and not path.name.startswith("."))


def test_a_store_at_a_url_reads_as_the_local_one_and_each_file_is_fetched_once(bucket: Bucket, local: Path) -> None:
    same(Store(bucket.url), local)
    same(Store(f"{bucket.url}/"), local)
    assert bucket.fetched.count("catalog.json") == 2
    sealed = [name for name in bucket.fetched if name != "catalog.json"]
    assert len(set(sealed)) == len(sealed)
    assert Store(bucket.url).digest() == Store(local).digest()
    assert Store(bucket.url).address == bucket.url


def test_files_are_named_by_their_digests_so_that_two_stores_share_them(
    bucket: Bucket, local: Path, cache: Path
) -> None:
    same(Store(bucket.url), local)
    upload(local, bucket.handler, "other")
    before = len(bucket.fetched)
    same(Store(bucket.url.replace("/store", "/other")), local)
    assert bucket.fetched[before:] == ["/other/catalog.json"]
    assert all(prep.cache.sha256(path) == path.name for path in kept(cache))


def test_only_what_is_read_is_fetched_the_manifest_first(bucket: Bucket) -> None:
    stream = Store(bucket.url).session(0).stream("spikes")
    assert bucket.fetched[:3] == ["catalog.json", "d1/s1.manifest.json", "d1/s1.zarr/streams/spikes/zarr.json"]
    assert all("/spikes/" in name for name in bucket.fetched[2:]) and not any(
        "/values/c/" in name for name in bucket.fetched
    )
    before = len(bucket.fetched)
    stream.read(slice(0, 9))
    assert [name.removeprefix("d1/s1.zarr/streams/spikes/values/") for name in bucket.fetched[before:]] == [
        "digests/0",
        "c/0/0/0",
    ]


def test_the_cache_stays_within_its_bound_and_what_was_used_last_stays(
    bucket: Bucket, local: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRAINLOOM_CACHE_GB", "0.00002")
    opened = Store(bucket.url)
    sizes = []
    for index in (0, 1):
        for name in opened.session(index).stream_names:
            opened.session(index).stream(name).read(slice(0, 9))
            sizes.append(sum(path.stat().st_size for path in kept(cache)))
    assert 10_000 < max(sizes) <= 20_000
    assert len({name for name in bucket.fetched if "manifest" in name}) == 2
    same(opened, local)
    last = max(kept(cache), key=lambda path: path.stat().st_mtime_ns)
    assert prep.cache.sha256(last) == last.name


def test_of_two_files_the_one_that_was_used_longer_ago_goes(bucket: Bucket, cache: Path) -> None:
    contents = [bytes([number]) * 400 for number in range(3)]
    entries = [{"bytes": 400, "sha256": prep.cache.hashlib.sha256(content).hexdigest()} for content in contents]
    for number, content in enumerate(contents):
        bucket.put(str(number), content)
    files = CachedFiles(bucket.url, cache, 1000)
    for number in (0, 1, 0, 2):
        with files.open(str(number), entries[number]) as file:
            assert file.read() == contents[number]
        time.sleep(0.02)
    assert bucket.fetched == ["0", "1", "2"]
    assert {path.name for path in kept(cache)} == {entries[0]["sha256"], entries[2]["sha256"]}


def test_an_array_stays_good_when_its_file_is_evicted(bucket: Bucket, local: Path, cache: Path) -> None:
    rows = Store(bucket.url).session(0).stream("roi")
    values = rows.read(slice(0, 9))
    for path in kept(cache):
        path.unlink()
    assert_array_equal(values, Store(local).session(0).stream("roi").read(slice(0, 9)))
    assert_array_equal(rows.read(slice(0, 125)), Store(local).session(0).stream("roi").read(slice(0, 125)))


SHARD = "d1/s1.zarr/streams/running/values/c/0/0/0"


def test_a_file_that_arrives_damaged_is_fetched_once_more_then_refused_and_not_kept(
    bucket: Bucket, cache: Path
) -> None:
    content = bucket.bytes_of(SHARD)
    bucket.put(SHARD, bytes([content[0] ^ 1]) + content[1:])
    rows = Store(bucket.url).session(0).stream("running")
    with pytest.raises(DigestError) as refused:
        rows.read(slice(0, 9))
    assert re.fullmatch(
        rf"{bucket.url}/{SHARD} is not what its manifest says: its sha256 is [0-9a-f]{{64}}, expected [0-9a-f]{{64}}\. "
        r"Its session is being made again, or the file is damaged\. Open the store anew when no `make prep` works on "
        r"it; if that does not help, run `make verify STORE=…`\.",
        str(refused.value),
    )
    assert bucket.fetched.count(SHARD) == 2
    assert all(prep.cache.sha256(path) == path.name for path in kept(cache))


@pytest.mark.parametrize("name", [SHARD, "d1/s1.zarr/streams/running/start_ns/c/0", "d1/s1.manifest.json"])
@pytest.mark.parametrize("cut", [False, True])
def test_a_copy_that_was_damaged_in_the_cache_is_fetched_again(
    name: str, cut: bool, bucket: Bucket, local: Path, cache: Path
) -> None:
    Store(bucket.url).session(0).stream("running").read(slice(0, 9))
    digest = prep.cache.sha256(local / name)
    copy = cache / digest[:2] / digest
    content = copy.read_bytes()
    copy.write_bytes(content[:-1] if cut else bytes([content[0] ^ 1]) + content[1:])
    expected = Store(local).session(0).stream("running").read(slice(0, 9))
    assert_array_equal(Store(bucket.url).session(0).stream("running").read(slice(0, 9)), expected)
    assert copy.read_bytes() == content and bucket.fetched.count(name) == 2


def test_a_transfer_that_fails_is_tried_again_and_goes_on_where_it_broke(bucket: Bucket, local: Path) -> None:
    for number, served in enumerate(bucket.handler.files.values()):
        served.statuses = [503, 500, 0] if number % 2 else []
        served.breaks_after = [len(served.content) // 2]
    same(Store(bucket.url), local)
    assert any(wanted.startswith("bytes=") for _, wanted in bucket.handler.requests)


@pytest.mark.parametrize(
    ("status", "attempts", "said"),
    [
        (503, 5, "the server answers 503 Service Unavailable; tried 5 times. Run it again later."),
        (
            403,
            1,
            "the server answers 403: it may not be read, or is not there. Check the URL (a signed one may be too old) "
            "and the credentials.",
        ),
    ],
)
def test_what_cannot_be_fetched_is_named_with_the_remedy(status: int, attempts: int, said: str, bucket: Bucket) -> None:
    opened, name = Store(bucket.url), "d1/s1.manifest.json"
    bucket.handler.files[f"/store/{name}"].statuses = [status] * 9
    with pytest.raises(StoreError) as refused:
        opened.session(0)
    assert str(refused.value) == f"{bucket.url}/{name}: {said}"
    assert bucket.fetched.count(name) == attempts


def test_a_full_disk_is_named_with_the_remedy(bucket: Bucket, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Store(bucket.url)

    def full(url: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prep.cache, "download", full)
    with pytest.raises(StoreError) as refused:
        opened.session(0)
    assert str(refused.value) == (
        f"The cache {cache} cannot be used ([Errno 28] No space left on device). Free some disk, or set "
        "BRAINLOOM_CACHE to another folder or BRAINLOOM_CACHE_GB to less than 64."
    )
    assert kept(cache) == []


def test_a_cache_that_is_no_folder_is_named(bucket: Bucket, cache: Path) -> None:
    cache.write_text("a file")
    with pytest.raises(
        StoreError, match=rf"^The cache {cache} cannot be used \(\[Errno \d+\] Not a directory: .*Free some"
    ):
        Store(bucket.url).session(0)


def test_a_url_that_holds_no_store_is_named(bucket: Bucket) -> None:
    with pytest.raises(StoreError) as refused:
        Store(f"{bucket.url}x")
    assert str(refused.value) == (
        f"{bucket.url}x/catalog.json is missing. Is this a token store? "
        f"Run `make prep SRC=… OUT={bucket.url}x` to make one."
    )


def test_a_protocol_that_is_none_is_named() -> None:
    with pytest.raises(StoreError, match=r"^nope://x: nope:// is not read\. A store is a folder, s3:// or https://\.$"):
        Store("nope://x")


@pytest.mark.parametrize("text", ["many", "-1", "1e3"])
def test_a_bound_that_is_no_number_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINLOOM_CACHE_GB", text)
    with pytest.raises(StoreError) as refused:
        Store("https://nowhere")
    assert str(refused.value) == (
        f"BRAINLOOM_CACHE_GB={text!r} is no size. Give a number of gigabytes, for instance BRAINLOOM_CACHE_GB=200."
    )


def test_a_digest_that_would_become_a_path_is_refused(cache: Path) -> None:
    files = CachedFiles("https://nowhere", cache, 1000)
    with pytest.raises(DigestError, match=r"'\.\./\.\./x' in its manifest is no sha256"):
        files.open("d1/x", {"sha256": "../../x"})


def test_without_a_word_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BRAINLOOM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/brainloom")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/her")
    assert cache_folder() == Path("/home/her/.cache/brainloom")


def test_what_a_killed_process_left_half_written_is_swept_when_it_is_old(bucket: Bucket, cache: Path) -> None:
    old, new = cache / "ab" / ".abc.x1", cache / "ab" / ".abc.x2"
    old.parent.mkdir(parents=True)
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (0, 0))
    Store(bucket.url).session(0)
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


def test_processes_that_share_a_cache_which_is_too_small_read_the_same(
    bucket: Bucket, local: Path, cache: Path
) -> None:
    environment = {**os.environ, "BRAINLOOM_CACHE_GB": "0.00001"}
    command = [sys.executable, "-c", READ, bucket.url, str(local)]
    readers = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    told = [reader.communicate(timeout=120) for reader in readers]
    assert told == [("the same\n", "")] * 4
    assert all(prep.cache.sha256(path) == path.name for path in kept(cache))


def test_a_file_that_many_threads_want_at_once_is_fetched_once(bucket: Bucket, local: Path) -> None:
    opened = [Store(bucket.url) for _ in range(8)]
    barrier = threading.Barrier(8)

    def read(store: Store) -> None:
        barrier.wait()
        store.session(0)

    threads = [threading.Thread(target=read, args=(store,)) for store in opened]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bucket.fetched.count("d1/s1.manifest.json") == 1
