"""A store in a bucket: the bytes of a local one, sealed last, whatever is killed, damaged or written by others.

In: hand-built sessions, recordings that stand for NWB files, an S3 server on loopback. Out: its objects, messages.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mirror_builders
import pytest
import remote_builders
from distributed import Client
from mirror_builders import URL, Log, keys, mirror, objects, seal
from numpy.testing import assert_array_equal
from store_builders import FakeRecipe, fake_planner, tree
from test_prep_store import read_all

import prep.mirror
from prep import catalog
from prep.__main__ import main
from prep.disk import DigestError
from prep.files import find_files
from prep.ingest import connect, run_ingest
from prep.ingest_report import Outcome
from prep.mirror import Mirror
from prep.store import Store
from prep.urls import RemoteError

nothing_of_this_machine = pytest.fixture(autouse=True)(remote_builders.nothing_of_this_machine)
s3_address = pytest.fixture(scope="module")(remote_builders.s3_server)
bucket = pytest.fixture(remote_builders.empty_bucket)
log = pytest.fixture(mirror_builders.log_of_writes)
credentials = pytest.fixture(mirror_builders.with_credentials)
can_write = pytest.mark.usefixtures("credentials")


@pytest.fixture(scope="module")
def client(s3_address: str) -> Iterator[Client]:
    with connect(None, 2) as connected:
        connected.run(at_loopback, s3_address)
        yield connected


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINLOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prep.mirror, "PAUSE_S", 0.01)


def at_loopback(address: str) -> None:
    os.environ.update(
        AWS_ENDPOINT_URL=address,
        AWS_EC2_METADATA_DISABLED="true",
        AWS_ACCESS_KEY_ID="testing",
        AWS_SECRET_ACCESS_KEY="testing",
    )


def recordings(folder: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def ingest(client: Client, source: Path, root: Path, far: Mirror | None = None) -> list[Outcome]:
    return run_ingest(find_files([source], "d1"), root, FakeRecipe(), lambda: client, planner=fake_planner, far=far)


def states(outcomes: list[Outcome]) -> list[str]:
    return [outcome.state for outcome in outcomes]


def local_store(folder: Path, *sessions: tuple[str, int]) -> dict[str, str]:
    """What the same sessions are in a folder."""
    for session_id, seed in sessions:
        seal(folder / "local", session_id, seed)
    catalog.write(folder / "local")
    return {name: digest for name, digest in tree(folder / "local").items() if not name.startswith(".")}


# ---------------------------------------------------------------- the same store


@can_write
def test_a_store_in_a_bucket_is_the_local_one_byte_for_byte_and_a_rerun_writes_nothing(
    client: Client, bucket: Any, log: Log, tmp_path: Path
) -> None:
    texts = {"a.nwb": "session=s1", "b.nwb": "session=s1 seed=4", "sub/c.nwb": "session=s3 seed=5"}
    source = recordings(tmp_path / "set", texts)
    ingest(client, source, tmp_path / "local")
    local = {name: digest for name, digest in tree(tmp_path / "local").items() if not name.startswith(".")}
    far = mirror(tmp_path / "build")
    assert states(ingest(client, source, far.build, far)) == ["ok"] * 3
    assert objects(bucket) == local
    for manifest in (name for name in local if name.endswith(".manifest.json")):
        folder = f"set/{manifest.removesuffix('.manifest.json')}.zarr/"
        assert max(n for n, key in enumerate(log.puts) if key.startswith(folder)) < log.puts.index(f"set/{manifest}")
    assert log.puts[-1] == "set/catalog.json" and log.puts.count("set/catalog.json") == 1
    stimuli = [n for n, key in enumerate(log.puts) if key.startswith("set/stimuli/")]
    assert max(stimuli) < min(n for n, key in enumerate(log.puts) if key.endswith("s1.manifest.json"))
    for build in (far.build, tmp_path / "of another machine"):
        log.puts.clear()
        log.removed.clear()
        assert states(ingest(client, source, build, mirror(build))) == ["already there"] * 3
        assert log.puts == ["set/.lock"] and log.removed == ["set/failed.jsonl"]
    assert objects(bucket) == local


@can_write
def test_the_bytes_of_what_was_sent_leave_the_folder_and_what_is_new_is_added_to_it(
    client: Client, bucket: Any, log: Log, tmp_path: Path
) -> None:
    source = recordings(tmp_path / "set", {"a.nwb": "session=s1"})
    far = mirror(tmp_path / "build")
    ingest(client, source, far.build, far)
    inside = [path.name for path in (far.build / "d1" / "s1.zarr").iterdir()]
    assert sorted(inside) == [".away", "zarr.json"]
    recordings(tmp_path / "set", {"b.nwb": "session=s2 seed=7"})
    log.puts.clear()
    assert states(ingest(client, source, far.build, far)) == ["already there", "ok"]
    assert not any("/s1." in key or "stimuli" in key for key in log.puts)
    ingest(client, source, tmp_path / "local")
    assert objects(bucket)["catalog.json"] == tree(tmp_path / "local")["catalog.json"]


@can_write
def test_a_reader_of_the_bucket_gets_the_windows_of_the_local_store(bucket: Any, tmp_path: Path) -> None:
    local_store(tmp_path, ("s1", 1), ("s2", 7))
    far = sent(tmp_path / "build", ("s1", 1), ("s2", 7))
    far.publish()
    for ours, theirs in zip(read_all(Store(URL)), read_all(Store(tmp_path / "local")), strict=True):
        assert_array_equal(ours, theirs)
    assert Store(URL).digest() == Store(tmp_path / "local").digest()
    assert main(["report", URL, "--out", str(tmp_path / "far.html")]) == 0
    (tmp_path / "local").rename(tmp_path / "set")
    assert main(["report", str(tmp_path / "set"), "--out", str(tmp_path / "near.html")]) == 0
    assert (tmp_path / "far.html").read_text() == (tmp_path / "near.html").read_text()


@can_write
def test_a_dry_run_writes_nothing_into_the_bucket_and_knows_what_is_there(
    client: Client, bucket: Any, log: Log, tmp_path: Path
) -> None:
    sent(tmp_path / "build", ("s1", 1))
    log.events.clear()
    source = recordings(tmp_path / "set", {"a.nwb": "session=s2"})
    far = mirror(tmp_path / "of another machine")
    how: dict[str, Any] = {"planner": fake_planner, "is_dry": True, "far": far}
    outcomes = run_ingest(find_files([source], "d1"), far.build, FakeRecipe(), lambda: client, **how)
    assert states(outcomes) == ["would be ingested"] and log.events == []
    assert (far.build / "d1" / "s1.manifest.json").exists()


@can_write
def test_verify_finds_in_a_bucket_what_it_finds_in_a_folder(
    bucket: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    far = sent(tmp_path / "build", ("s1", 1), ("s2", 7))
    far.publish()
    assert main(["verify", URL]) == 0
    assert f"{URL}: all is as it was written." in capsys.readouterr().out
    name = "d1/s1.zarr/streams/running/values/c/0/0/0"
    body = bucket.get_object(Bucket="lab", Key=f"set/{name}")["Body"].read()
    bucket.put_object(Bucket="lab", Key=f"set/{name}", Body=bytes([body[0] ^ 1]) + body[1:])
    bucket.delete_object(Bucket="lab", Key="set/d1/s2.zarr/streams/running/start_ns/c/0")
    bucket.put_object(Bucket="lab", Key="set/d1/s3.zarr/zarr.json", Body=b"{}")
    assert main(["verify", URL]) == 1
    told = capsys.readouterr().out
    for line in (
        f"{name}: damaged (sha256 differs from the manifest)",
        "d1/s2.zarr/streams/running/start_ns/c/0: missing",
        "d1/s3.zarr/zarr.json: not sealed by a manifest; run the same `make prep` again",
        f"{URL}: 3 problems.",
    ):
        assert line in told


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://host/set", r"https://host/set: https:// cannot be listed. Verify the store where it was made."),
        ("s3://lab/nothing", r"s3://lab/nothing is no token store: it has neither a catalog.json nor a manifest."),
    ],
)
def test_what_cannot_be_verified_is_named(
    url: str, message: str, bucket: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", url]) == 2
    assert message in capsys.readouterr().err


def sent(build: Path, *sessions: tuple[str, int]) -> Mirror:
    """Sessions built and sent, without a catalog."""
    far = mirror(build)
    far.gather()
    for session_id, seed in sessions:
        seal(build, session_id, seed)
    far.gather()
    return far


# ---------------------------------------------------------------- several at once


@pytest.mark.slow
@can_write
def test_many_runs_that_publish_at_once_all_end_in_the_catalog(bucket: Any, tmp_path: Path) -> None:
    names = [(f"s{number}", number) for number in range(3)]
    fars = [sent(tmp_path / f"build-{name}", (name, seed)) for name, seed in names]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda far: far.publish(), fars))
    local = local_store(tmp_path, *names)
    assert objects(bucket) == local


@can_write
def test_a_catalog_that_another_run_writes_in_between_is_not_lost(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = sent(tmp_path / "1", ("s1", 1)), sent(tmp_path / "2")
    put, turns = prep.mirror.put_bytes, iter(range(9))

    def outrun(url: str, content: bytes, only_over: str = "") -> str:
        if url.endswith("catalog.json") and next(turns) == 0:  # between the first one's listing and its write
            seal(second.build, "t1", 3)
            second.gather()
            second.publish()
        return put(url, content, only_over)

    monkeypatch.setattr(prep.mirror, "put_bytes", outrun)
    first.publish()
    assert [entry["session_id"] for entry in Store(URL).entries] == ["s1", "t1"]


@can_write
def test_a_catalog_that_others_keep_writing_is_given_up_with_a_line(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far, put, turns = sent(tmp_path / "1", ("s1", 1)), prep.mirror.put_bytes, iter(range(9))

    def outrun(url: str, content: bytes, only_over: str = "") -> str:
        put(url, f"another catalog, number {next(turns)}".encode())
        return put(url, content, only_over)

    monkeypatch.setattr(prep.mirror, "put_bytes", outrun)
    monkeypatch.setattr(prep.mirror, "MAX_OUTRUNS", 3)
    with pytest.raises(RemoteError, match=r"catalog\.json: 3 times another run wrote it first\. Run it again later\."):
        far.publish()


@can_write
def test_a_session_of_another_recording_that_came_in_between_stays_and_ours_gets_a_name_of_its_own(
    client: Client, bucket: Any, tmp_path: Path
) -> None:
    far = mirror(tmp_path / "build")
    far.gather()
    seal(far.build, "s1", 1)  # of s1.nwb
    source = recordings(tmp_path / "other", {"b.nwb": "session=s1 seed=4"})
    other = mirror(tmp_path / "of another machine")
    ingest(client, source, other.build, other)
    with pytest.raises(
        RemoteError, match=r"s3://lab/set/d1/s1\.zarr is of another recording \(b\.nwb\), which another"
    ):
        far.send("d1/s1.zarr")
    assert not (far.build / "d1" / "s1.zarr").exists()
    seal(far.build, "s1", 1)  # as a run does that was started before the other one ended
    assert states(ingest(client, recordings(tmp_path / "set", {"s1.nwb": "session=s1"}), far.build, far)) == ["ok"]
    first, second = Store(URL).entries
    assert (first["session_id"], first["sources"][0]["file"]) == ("s1", "b.nwb")
    assert second["session_id"].startswith("s1-") and second["sources"][0]["file"] == "s1.nwb"


# ---------------------------------------------------------------- what is replaced, what is lost


@can_write
def test_a_session_that_is_made_again_leaves_the_catalog_before_its_bytes_change(
    bucket: Any, log: Log, tmp_path: Path
) -> None:
    far = sent(tmp_path / "build", ("s1", 1), ("s2", 7))
    far.publish()
    bucket.put_object(Bucket="lab", Key="set/d1/s1.zarr/streams/running/values/c/9/0/0", Body=b"of an older one")
    log.events.clear()
    before = objects(bucket)
    far.send(seal(far.build, "s1", 5, "a changed recording"))
    assert log.events[:2] == ["put set/catalog.json", "remove set/d1/s1.manifest.json"]
    assert log.events[-1] == "put set/d1/s1.manifest.json"
    assert [entry["session_id"] for entry in Store(URL).entries] == ["s2"]
    far.publish()
    seal(tmp_path / "local", "s2", 7)
    seal(tmp_path / "local", "s1", 5, "a changed recording")
    catalog.write(tmp_path / "local")
    after = objects(bucket)
    assert after == {name: digest for name, digest in tree(tmp_path / "local").items() if not name.startswith(".")}
    replaced = {event.removeprefix("put set/") for event in log.events if event.startswith("put set/d1/s1.zarr")}
    assert replaced == {name for name in after if before.get(name) != after[name] and "s1.zarr" in name}


@pytest.mark.slow
@can_write
@pytest.mark.parametrize(
    ("gone", "damage"), [("d1/s1.manifest.json", "cut"), ("d1/s1.zarr/streams/running/values/c/0/0/0", "missing")]
)
def test_what_is_no_longer_whole_in_the_bucket_does_not_count_and_is_made_again(
    client: Client, bucket: Any, log: Log, tmp_path: Path, gone: str, damage: str
) -> None:
    source = recordings(tmp_path / "set", {"a.nwb": "session=s1", "b.nwb": "session=s2 seed=7"})
    far = mirror(tmp_path / "build")
    ingest(client, source, far.build, far)
    before = objects(bucket)
    if damage == "missing":
        bucket.delete_object(Bucket="lab", Key=f"set/{gone}")
    else:
        bucket.put_object(Bucket="lab", Key=f"set/{gone}", Body=b"{")
    assert states(ingest(client, source, far.build, far)) == ["ok", "already there"]
    assert objects(bucket) == before


@can_write
def test_what_one_run_sealed_and_could_not_send_the_next_one_sends(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = mirror(tmp_path / "build")
    far.gather()
    seal(far.build, "s1", 1)
    with monkeypatch.context() as patch, pytest.raises(RemoteError, match=r"no answer .*tried 5 times\. Run it again"):
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        prep.s3.forget_clients()
        far.gather()
    prep.s3.forget_clients()
    assert objects(bucket) == {}
    far.gather()
    far.publish()
    assert objects(bucket) == local_store(tmp_path, ("s1", 1))


@can_write
def test_a_transfer_that_the_server_stored_wrong_is_refused_and_nothing_is_sealed(
    bucket: Any, log: Log, tmp_path: Path
) -> None:
    log.damages = "running/values/c/0/0/0"
    with pytest.raises(RemoteError, match=r"running/values/c/0/0/0: the server does not confirm the checksum of what"):
        sent(tmp_path / "build", ("s1", 1))
    assert not any(name.endswith("s1.manifest.json") for name in keys(bucket))
    log.damages = ""
    far = mirror(tmp_path / "build")
    far.gather()
    far.publish()
    assert objects(bucket) == local_store(tmp_path, ("s1", 1))


@can_write
def test_a_file_that_changed_after_it_was_sealed_is_not_sent(bucket: Any, tmp_path: Path) -> None:
    far = mirror(tmp_path / "build")
    far.gather()
    path = far.build / seal(far.build, "s1") / "streams/running/start_ns/c/0"
    path.write_bytes(b"?" * path.stat().st_size)
    with pytest.raises(DigestError, match=r"start_ns/c/0 changed after it was sealed: its sha256 is .*, its manifest"):
        far.gather()
    assert not any(name.endswith("s1.manifest.json") for name in keys(bucket))


@can_write
def test_failures_of_the_last_run_stand_in_the_bucket_until_the_next(
    client: Client, bucket: Any, tmp_path: Path
) -> None:
    source = recordings(tmp_path / "set", {"a.nwb": "session=s1", "b.nwb": "refuse=nothing_here"})
    far = mirror(tmp_path / "build")
    assert states(ingest(client, source, far.build, far)) == ["ok", "refused"]
    assert "failed.jsonl" in objects(bucket)
    (source / "b.nwb").unlink()
    ingest(client, source, far.build, far)
    assert "failed.jsonl" not in objects(bucket)
