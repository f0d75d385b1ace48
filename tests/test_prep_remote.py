"""Files behind URLs: the same store as from local files, whatever the network does.

In: a web server and an S3 server on loopback, recordings that stand for NWB files. Out: staged files, stores, messages.
"""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import remote_builders
from distributed import Client
from nwb_builders import with_units, write
from remote_builders import Handler, Served, one, put
from store_builders import FakeRecipe, fake_planner, tree

from prep import remote, s3, staging, urls
from prep.__main__ import main
from prep.disk import StoreError
from prep.files import find_files
from prep.ingest import connect, run_ingest
from prep.ingest_report import Outcome
from prep.staging import release, stage
from prep.urls import RemoteError
from prep.write_session import source_of

CONTENT = bytes(range(256)) * 5000  # more than one piece

nothing_of_this_machine = pytest.fixture(autouse=True)(remote_builders.nothing_of_this_machine)
web = pytest.fixture(remote_builders.web_server)
s3_address = pytest.fixture(scope="module")(remote_builders.s3_server)
bucket = pytest.fixture(remote_builders.empty_bucket)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with connect(None, 2) as connected:
        yield connected


def ingest(client: Client, sources: list[Any], store: Path) -> list[Outcome]:
    return run_ingest(find_files(sources, "d1", store), store, FakeRecipe(), lambda: client, planner=fake_planner)


def session_bytes(store: Path) -> dict[str, str]:
    """All that a reader of the store sees."""
    return {name: digest for name, digest in tree(store).items() if not name.startswith(".")}


def ranges(handler: type[Handler]) -> list[str]:
    return [wanted for _, wanted in handler.requests]


# ---------------------------------------------------------------- one download


def test_a_file_behind_a_url_is_staged_under_its_own_name(web: tuple[str, type[Handler]], tmp_path: Path) -> None:
    address, handler = web
    handler.files["/data/a.nwb"] = Served(CONTENT)
    found = one(f"{address}/data/a.nwb", tmp_path)
    source = stage(found)
    assert found.path.read_bytes() == CONTENT
    assert found.path.name == source.file == "a.nwb"
    assert source == source_of(found.path)
    assert list(found.place.glob("part")) == []


def test_a_second_stage_asks_but_brings_nothing(web: tuple[str, type[Handler]], tmp_path: Path) -> None:
    address, handler = web
    handler.files["/a.nwb"] = Served(CONTENT)
    found = one(f"{address}/a.nwb", tmp_path)
    stage(found)
    before = found.path.stat().st_ino
    assert len(handler.requests) == 2  # one asks, one brings
    stage(found)
    assert len(handler.requests) == 3 and found.path.stat().st_ino == before


def test_bytes_that_changed_on_the_stage_are_brought_again(web: tuple[str, type[Handler]], tmp_path: Path) -> None:
    address, handler = web
    handler.files["/a.nwb"] = Served(CONTENT)
    found = one(f"{address}/a.nwb", tmp_path)
    stage(found)
    found.path.write_bytes(b"x" + CONTENT[1:])
    stage(found)
    assert found.path.read_bytes() == CONTENT


def test_a_file_that_changed_on_the_server_is_brought_again(web: tuple[str, type[Handler]], tmp_path: Path) -> None:
    address, handler = web
    handler.files["/a.nwb"] = Served(CONTENT)
    found = one(f"{address}/a.nwb", tmp_path)
    stage(found)
    handler.files["/a.nwb"] = Served(CONTENT[::-1])
    stage(found)
    assert found.path.read_bytes() == CONTENT[::-1]


def test_a_broken_connection_is_taken_up_where_it_broke(web: tuple[str, type[Handler]], tmp_path: Path) -> None:
    address, handler = web
    handler.files["/a.nwb"] = Served(CONTENT, breaks_after=[0, 100_000, 50_000])  # the first answers the question
    found = one(f"{address}/a.nwb", tmp_path)
    stage(found)
    assert found.path.read_bytes() == CONTENT
    assert ranges(handler) == ["", "", "bytes=100000-", "bytes=150000-"]


def test_a_server_without_ranges_sends_it_all_again(web: tuple[str, type[Handler]], tmp_path: Path) -> None:
    address, handler = web
    handler.files["/a.nwb"] = Served(CONTENT, has_ranges=False, breaks_after=[0, 100_000, 1_100_000])
    found = one(f"{address}/a.nwb", tmp_path)
    stage(found)
    assert found.path.read_bytes() == CONTENT


def test_what_a_killed_run_left_is_gone_on_with_and_never_taken_for_whole(
    web: tuple[str, type[Handler]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, handler = web
    handler.files["/a.nwb"] = Served(CONTENT, breaks_after=[0, 100_000])
    found = one(f"{address}/a.nwb", tmp_path)

    def killed(seconds: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(urls.time, "sleep", killed)
        stage(found)
    assert not found.path.exists()
    handler.requests.clear()
    stage(found)
    assert found.path.read_bytes() == CONTENT
    assert ranges(handler) == ["", "bytes=100000-"]


def test_a_part_of_other_bytes_is_not_gone_on_with(
    web: tuple[str, type[Handler]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, handler = web
    handler.files["/a.nwb"] = Served(CONTENT, has_ranges=False, extra_length=9)
    found = one(f"{address}/a.nwb", tmp_path)
    with pytest.raises(RemoteError):
        stage(found)
    handler.files["/a.nwb"] = Served(CONTENT[::-1])
    stage(found)
    assert found.path.read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("status", [503, 500, 429])
def test_a_busy_server_is_asked_again(status: int, web: tuple[str, type[Handler]], tmp_path: Path) -> None:
    address, handler = web
    handler.files["/a.nwb"] = Served(CONTENT, statuses=[status, status])
    assert stage(one(f"{address}/a.nwb", tmp_path)).bytes == len(CONTENT)


def test_an_empty_file_and_one_without_etag_are_staged(web: tuple[str, type[Handler]], tmp_path: Path) -> None:
    address, handler = web
    handler.files.update({"/a.nwb": Served(b""), "/b.nwb": Served(CONTENT, has_etag=False, breaks_after=[0, 1000])})
    assert stage(one(f"{address}/a.nwb", tmp_path)).bytes == 0
    assert one(f"{address}/b.nwb", tmp_path).path.exists() is False
    found = one(f"{address}/b.nwb", tmp_path)
    stage(found)
    assert found.path.read_bytes() == CONTENT
    assert staging.known_source(found) is None  # nothing tells these bytes from others of that size


@pytest.mark.parametrize(
    ("served", "message"),
    [
        (None, r"http://127\.0\.0\.1:\d+/a\.nwb: the server answers 404: there is no such file\. Check the URL\."),
        (Served(CONTENT, statuses=[403]), r"answers 403: it may not be read, or is not there\. Check the URL"),
        (Served(CONTENT, statuses=[418]), r"/a\.nwb: the server answers 418 .*Check the URL\."),
        (Served(CONTENT, statuses=[503] * 5), r"the server answers 503 .*; tried 5 times\. Run it again later\."),
        (
            Served(CONTENT, extra_length=7, has_ranges=False),
            r"it ended after 1,280,000 of 1,280,007 bytes; tried 5 times\.|the connection broke",
        ),
        (Served(b"", location="file:///etc/passwd"), r"302|file"),
    ],
)
def test_a_refusal_is_one_line_without_secrets(
    served: Served | None, message: str, web: tuple[str, type[Handler]], tmp_path: Path
) -> None:
    address, handler = web
    if served is not None:
        handler.files["/a.nwb"] = served
    with pytest.raises(RemoteError, match=message) as caught:
        stage(one(f"{address}/a.nwb?signature=secret", tmp_path))
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_host_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_host(*args: object, **more: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_such_host)
    with pytest.raises(RemoteError, match=r"https://no\.where/a\.nwb: no such host \(Name or service not known\)"):
        stage(one("https://no.where/a.nwb", tmp_path))


def test_a_server_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.nwb"
        with pytest.raises(RemoteError, match=r"no answer \(TimeoutError.*tried 5 times"):
            stage(one(url, tmp_path))


def test_a_full_disk_is_seen_before_the_download(
    web: tuple[str, type[Handler]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, handler = web
    handler.files["/a.nwb"] = Served(CONTENT)
    monkeypatch.setattr(staging, "RESERVE_BYTES", 2**60)
    with pytest.raises(StoreError, match=r"has 1,280,000 bytes, .* Give --stage a folder on a larger disk\."):
        stage(one(f"{address}/a.nwb", tmp_path))
    assert len(handler.requests) == 1


# ---------------------------------------------------------------- s3


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "s3://nobodys/set",
            r"s3://nobodys/set: the server answers 404 NoSuchBucket: there is no bucket 'nobodys'\. Check its",
        ),
        ("s3://", r"names no bucket\. Expected s3://bucket/prefix"),
        ("s3://lab/nothing.nwb", r"s3://lab/nothing\.nwb: the server answers 404: there is no such file"),
    ],
)
def test_a_bucket_or_object_that_is_not_there_is_named(bucket: Any, url: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match=message):
        stage(one(url, tmp_path))


def test_what_is_not_public_is_read_with_credentials(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(bucket, "a.nwb", CONTENT, acl="private")
    with pytest.raises(RemoteError, match=r"s3://lab/a\.nwb: the server answers 403: .* and the credentials\."):
        stage(one("s3://lab/a.nwb", tmp_path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    s3.forget_clients()
    assert stage(one("s3://lab/a.nwb", tmp_path)).bytes == len(CONTENT)


def test_a_broken_s3_download_is_taken_up_where_it_broke(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(bucket, "a.nwb", CONTENT)
    found, starts, whole = one("s3://lab/a.nwb", tmp_path), [], s3.open_object

    def breaking(url: str, start: int) -> urls.Answer:
        starts.append(start)
        return whole(url, start)

    def pieces(body: Any) -> Iterator[bytes]:
        yield body.read(100_000)
        if len(starts) < 4:
            raise urls.Trouble("the connection broke")
        yield body.read()

    monkeypatch.setattr(s3, "open_object", breaking)
    monkeypatch.setattr(remote, "_pieces", pieces)
    stage(found)
    assert found.path.read_bytes() == CONTENT and starts == [0, 0, 100_000, 200_000]


def test_bytes_that_are_not_those_of_the_etag_are_refused(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(bucket, "a.nwb", CONTENT)
    found = one("s3://lab/a.nwb", tmp_path)
    with monkeypatch.context() as patch, pytest.raises(RemoteError, match="are not those of its ETag"):
        patch.setattr(remote, "_pieces", lambda body: iter([CONTENT[::-1]]))
        stage(found)
    assert not found.path.exists() and stage(found).bytes == len(CONTENT)


def test_an_nwb_zarr_folder_is_staged_whole(bucket: Any, tmp_path: Path) -> None:
    folder = tmp_path / "r.nwb.zarr"
    for name in (".zgroup", "units/.zarray", "units/0.0", "units/0.1"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
        put(bucket, f"set/r.nwb.zarr/{name}", name.encode())
    found = one("s3://lab/set/r.nwb.zarr", tmp_path)
    assert stage(found) == source_of(folder)
    put(bucket, "set/r.nwb.zarr/units/0.1", b"more")
    assert stage(found) != source_of(folder)
    put(bucket, "set/r.nwb.zarr/../../up", b"x")
    with pytest.raises(RemoteError, match="would leave its folder"):
        stage(found)


# ---------------------------------------------------------------- ingest


def test_a_store_is_the_same_from_disk_https_and_s3(
    client: Client, web: tuple[str, type[Handler]], bucket: Any, s3_address: str, tmp_path: Path
) -> None:
    address, handler = web
    texts = {"a.nwb": "session=s1", "b.nwb": "session=s1 seed=4", "sub/c.nwb": "session=s3 seed=5"}
    for name, text in texts.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_text(text)
        handler.files[f"/set/{name}"] = Served(text.encode())
        put(bucket, f"set/{name}", text.encode())
    ingest(client, [tmp_path / "set"], tmp_path / "local")
    (tmp_path / "list.txt").write_text("# three\n" + "".join(f"{address}/set/{name}\n" for name in texts))
    client.run(at_loopback, s3_address)
    for name, source in (("web", f"@{tmp_path}/list.txt"), ("s3", "s3://lab/set")):
        outcomes = ingest(client, [source], tmp_path / name)
        assert [outcome.state for outcome in outcomes] == ["ok", "ok", "ok"], [o.told for o in outcomes]
        assert session_bytes(tmp_path / name) == session_bytes(tmp_path / "local")
        assert list((tmp_path / name / ".stage").glob("*/whole")) == []
        num_requests = len(handler.requests)
        assert [o.state for o in ingest(client, [source], tmp_path / name)] == ["already there"] * 3
        assert len(handler.requests) == num_requests + (3 if name == "web" else 0)


def at_loopback(address: str) -> None:
    os.environ.update(AWS_ENDPOINT_URL=address, AWS_EC2_METADATA_DISABLED="true")


def test_the_command_takes_urls_after_a_dry_run_too(
    web: tuple[str, type[Handler]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address, handler = web
    recording = write(tmp_path, with_units([0.5, 9.0], [1.0, 2.0]), "mouse.nwb")
    handler.files["/x/mouse.nwb"] = Served(recording.read_bytes())
    store = tmp_path / "store"
    command = ["ingest", f"{address}/x/mouse.nwb", "--out", str(store), "--dataset", "d1", "--workers", "1"]
    assert main([*command, "--dry-run"]) == 0
    assert main(command) == 0
    assert main(["ingest", str(recording), "--out", str(tmp_path / "local"), "--dataset", "d1", "--workers", "1"]) == 0
    assert session_bytes(store) == session_bytes(tmp_path / "local")
    assert "1 of 1 files are in the store" in capsys.readouterr().out


def test_one_url_that_fails_stops_nobody_and_its_file_stays_away(
    client: Client, web: tuple[str, type[Handler]], tmp_path: Path
) -> None:
    address, handler = web
    handler.files.update({"/a.nwb": Served(b"session=s1"), "/b.nwb": Served(b"refuse=nothing_here")})
    sources = [f"{address}/{name}.nwb" for name in "abc"]
    outcomes = ingest(client, sources, tmp_path / "store")
    assert [outcome.state for outcome in outcomes] == ["ok", "refused", "refused"]
    assert outcomes[1].reason == "nothing here"
    assert outcomes[2].reason == f"{address}/c.nwb: the server answers 404: there is no such file. Check the URL."
    assert list((tmp_path / "store" / ".stage").glob("*/whole")) == []


def test_what_another_ingest_may_still_read_stays(web: tuple[str, type[Handler]], tmp_path: Path) -> None:
    from prep.runs import run_of_its_own

    address, handler = web
    handler.files["/a.nwb"] = Served(CONTENT)
    found = one(f"{address}/a.nwb", tmp_path)
    kept = one(f"{address}/a.nwb", tmp_path, is_kept=True)
    stage(found)
    with run_of_its_own(tmp_path / "store"), run_of_its_own(tmp_path / "store"):
        release([found], tmp_path / "store")
        assert found.path.exists()
    release([kept], tmp_path / "store")
    assert found.path.exists()
    release([found], tmp_path / "store")
    assert not found.path.exists()
    assert staging.known_source(found) == source_of_bytes(tmp_path, CONTENT)


def source_of_bytes(folder: Path, content: bytes) -> Any:
    (folder / "a.nwb").write_bytes(content)
    return source_of(folder / "a.nwb")


def test_two_who_want_one_file_bring_it_once(web: tuple[str, type[Handler]], tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    address, handler = web
    handler.files["/a.nwb"] = Served(CONTENT)
    found = one(f"{address}/a.nwb", tmp_path)
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: stage(found), range(4)))) == 1
    assert len(handler.requests) == 5  # each asks, one brings
