"""A store in a bucket that cannot be: what a person is told, before the work begins where that is possible.

In: addresses, folders, an S3 server on loopback that refuses. Out: messages.
"""

from pathlib import Path
from typing import Any

import mirror_builders
import pytest
import remote_builders
from mirror_builders import mirror

import prep.s3
from prep.__main__ import main
from prep.disk import StoreError
from prep.mirror import Mirror, destination
from prep.urls import RemoteError

nothing_of_this_machine = pytest.fixture(autouse=True)(remote_builders.nothing_of_this_machine)
s3_address = pytest.fixture(scope="module")(remote_builders.s3_server)
bucket = pytest.fixture(remote_builders.empty_bucket)
credentials = pytest.fixture(mirror_builders.with_credentials)
can_write = pytest.mark.usefixtures("credentials")


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (
            "https://host/set",
            r"--out https://host/set: https:// cannot be written\. Give a folder or s3://bucket/prefix",
        ),
        ("gs://lab/set", r"--out gs://lab/set: gs:// cannot be written"),
        ("s3://", r"s3:// names no bucket\. Expected s3://bucket/prefix"),
    ],
)
def test_a_url_that_cannot_be_written_is_refused(
    out: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StoreError, match=message):
        destination(out, None)
    (tmp_path / "a.nwb").write_text("a recording")
    assert main(["ingest", str(tmp_path / "a.nwb"), "--out", out]) == 2
    assert "prep ingest: " in capsys.readouterr().err


def test_without_credentials_it_says_so_before_the_work_begins(bucket: Any, tmp_path: Path) -> None:
    with pytest.raises(RemoteError) as refused:
        mirror(tmp_path / "build").gather()
    assert str(refused.value) == (
        "s3://lab/set: writing needs credentials, and none were found: set AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, on every machine that has workers."
    )


def test_a_profile_that_is_not_there_is_named(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    prep.s3.forget_clients()
    with pytest.raises(RemoteError, match=r"no good credentials \(ProfileNotFound: .*nobody.*Mend them: set AWS"):
        mirror(tmp_path / "build").gather()


class Refusing:
    """A client whose every write is refused."""

    def __init__(self, status: int, code: str) -> None:
        self.status, self.code = status, code

    def put_object(self, **_: Any) -> None:
        from botocore.exceptions import ClientError

        answer = {"ResponseMetadata": {"HTTPStatusCode": self.status}, "Error": {"Code": self.code}}
        raise ClientError(answer, "PutObject")  # type: ignore[arg-type]  # an answer as short as a test needs


@can_write
@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (
            403,
            "AccessDenied",
            r"403 AccessDenied: it may not be written\. Its owner must allow these credentials s3:Put",
        ),
        (400, "ExpiredToken", r"400 ExpiredToken: the credentials are too old\. Renew them, then run the same command"),
        (400, "InvalidArgument", r"400 InvalidArgument\. Is this an S3 server that knows x-amz-checksum-sha256\?"),
        (400, "EntityTooLarge", r"400 EntityTooLarge: one object holds at most 5 GB\. Give the streams of the recipe"),
        (503, "SlowDown", r"the server answers 503 SlowDown; tried 5 times\. Run it again later\."),
        (400, "BadDigest", r"the bytes did not arrive as they were sent \(BadDigest\); tried 5 times"),
    ],
)
def test_a_refused_write_says_what_to_do(
    status: int, code: str, message: str, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prep.s3, "client", lambda: Refusing(status, code))
    with pytest.raises(RemoteError, match=message):
        prep.s3.put_bytes("s3://lab/set/x", b"x")


@can_write
def test_a_bucket_that_is_not_there_or_holds_something_else_is_named(bucket: Any, tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match=r"404 NoSuchBucket: there is no bucket 'nobodys'\. Check its name and AWS_"):
        Mirror(url="s3://nobodys/set", build=tmp_path / "1").gather()
    bucket.put_object(Bucket="lab", Key="set/thesis.tex", Body=b"x")
    with pytest.raises(
        StoreError, match=r"s3://lab/set is neither empty nor a token store \(it has no catalog\.json\)"
    ):
        mirror(tmp_path / "2").gather()


@can_write
def test_a_folder_that_is_of_something_else_is_not_built_in(bucket: Any, tmp_path: Path) -> None:
    mirror(tmp_path / "build").gather()
    with pytest.raises(StoreError, match=r"build is where s3://lab/set is built\. Give --build another folder\."):
        Mirror(url="s3://lab/other", build=tmp_path / "build").gather()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match=r"--build .*mine holds something else\. Give a new folder, or an empty one\."):
        mirror(tmp_path / "mine").gather()
    with pytest.raises(
        StoreError, match=r"--out .*build is where a store in a bucket is built\. Give another folder\."
    ):
        destination(str(tmp_path / "build"), None)
    with pytest.raises(
        StoreError, match=r"--build x is for a store in a bucket; --out .* is a folder\. Leave it out\."
    ):
        destination(str(tmp_path / "store"), Path("x"))


def test_the_folder_follows_from_the_url_and_two_urls_have_two() -> None:
    root, far = destination("s3://lab/a/set/", None)
    assert far == Mirror(url="s3://lab/a/set", build=root)
    assert root.parent == Path("build").resolve() and root.name.startswith("lab-a-set-")
    assert destination("s3://lab/a-set", None)[0] != root
    assert destination("s3://lab/a/set", Path("/x"))[0] == Path("/x")
