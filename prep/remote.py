"""Files behind URLs: what a server says of one, what lies below an S3 prefix, downloads that go on where they broke.

In: https://, http:// and s3:// URLs. Out: bytes on local disk; RemoteError, whose one line says what was answered.

S3 is anonymous unless the usual places (AWS_ACCESS_KEY_ID, AWS_PROFILE, ~/.aws, ...) hold credentials; another endpoint
than Amazon's comes from AWS_ENDPOINT_URL. Proxies come from the environment too.
"""

import contextlib
import email.message
import functools
import http.client
import re
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from prep.plan import PrepError

SCHEMES = ("https", "http", "s3")
MAX_TRIES = 5  # without a byte more than before
BACKOFF_S = 1.0  # before the second try; doubles with each
TIMEOUT_S = 60.0  # without a byte
PIECE_BYTES = 2**20
BUSY = (408, 425, 429)  # statuses that pass, as those from 500 on do

T = TypeVar("T")


class RemoteError(PrepError):
    """A file cannot be had from where the URL says; trying again now would not help."""


class Trouble(Exception):
    """What may pass: a broken connection, a busy server."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a server says of a file, and the file from byte `start` on."""

    size: int | None  # None: it does not say
    etag: str = ""
    modified: str = ""
    name: str = ""  # the file's name by Content-Disposition
    md5: str = ""  # of the whole file, where the server keeps one
    start: int = 0
    body: Any = None

    @property
    def fingerprint(self) -> str:
        """Equal for two answers about the same bytes; "" where the server gives nothing to tell by."""
        return f"{self.size} {self.etag or self.modified}" if self.etag or self.modified else ""


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One object below an S3 prefix."""

    path: PurePosixPath  # below the prefix
    size: int
    etag: str


def is_url(source: str) -> bool:
    """Whether a source is no local path; RemoteError where it is a URL of a kind that is not read."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", source)
    if match is None:
        return False
    if match[1].lower() not in SCHEMES:
        raise RemoteError(f"{source}: {match[1]}:// is not read. SRC is files, folders, https:// or s3:// URLs.")
    return True


def shown(url: str) -> str:
    """A URL without what may be secret: the query of a signed one, user and password."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def ask(url: str) -> Answer:
    """What the server says of a file. Raises RemoteError."""

    def attempt() -> Answer:
        answer = _open(url, 0, "")
        answer.body.close()
        return answer

    return _persist(url, attempt, lambda: 0)


def download(url: str, target: Path, known: Answer) -> None:
    """Bring a file to `target`, of which a part may be there already. Raises RemoteError; OSError of the local disk.

    `known`: what `ask` said; where the server says something else now, nothing of it is kept.
    """

    def have() -> int:
        return target.stat().st_size if target.exists() else 0

    def attempt() -> None:
        start = 0 if known.size is None or have() > known.size else have()
        if start != known.size or start == 0:
            _bring(url, target, known, start)
        if known.size is not None and have() != known.size:
            raise Trouble(f"it ended after {have():,} of {known.size:,} bytes")

    _persist(url, attempt, have)


def _bring(url: str, target: Path, known: Answer, start: int) -> None:
    answer = _open(url, start, known.etag)
    with contextlib.closing(answer.body):
        if (answer.size, answer.fingerprint) != (known.size, known.fingerprint):
            target.unlink(missing_ok=True)
            raise RemoteError(f"{shown(url)}: it changed while it was being read. Run the same command again.")
        with open(target, "ab") as file:
            file.truncate(answer.start)  # 0 where the server does not serve ranges
            for piece in _pieces(answer.body):
                file.write(piece)


def _pieces(body: Any) -> Iterator[bytes]:
    while True:
        try:
            piece = body.read(PIECE_BYTES)
        except Exception as error:  # each library has its own; none of them is about the local disk
            raise Trouble(f"the connection broke ({_line(error)})") from error
        if not piece:
            return
        yield piece


def _persist(url: str, attempt: Callable[[], T], progress: Callable[[], int]) -> T:
    """Try until it works, or until nothing has moved for MAX_TRIES times."""
    tries, furthest = 0, progress()
    while True:
        try:
            return attempt()
        except Trouble as trouble:
            tries = tries + 1 if progress() <= furthest else 1
            furthest = max(furthest, progress())
            if tries >= MAX_TRIES:
                raise RemoteError(f"{shown(url)}: {trouble}; tried {tries} times. Run it again later.") from trouble
            time.sleep(BACKOFF_S * 2 ** (tries - 1))


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _refuse(url: str, status: int, reason: str) -> Exception:
    """The error for an HTTP status."""
    where = f"{shown(url)}: the server answers {status}"
    if status >= 500 or status in BUSY:
        return Trouble(f"the server answers {status} {reason}".rstrip())
    if status in (404, 410):
        return RemoteError(f"{where}: there is no such file. Check the URL.")
    if status in (401, 403):
        what = "it may not be read, or is not there. Check the URL (a signed one may be too old) and the credentials."
        return RemoteError(f"{where}: {what}")
    return RemoteError(f"{where} {reason}".rstrip() + ". Check the URL.")


def _open(url: str, start: int, etag: str) -> Answer:
    """Ask for a file from byte `start` on; where the server will not, or the file is another one now, from 0 on."""
    return (_open_s3 if url.lower().startswith("s3://") else _open_http)(url, start, etag)


# ---------------------------------------------------------------- https


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    """As urllib's own, without file:// and ftp://."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _open_http(url: str, start: int, etag: str) -> Answer:
    headers = {"Range": f"bytes={start}-"} if start else {}
    if start and etag and not etag.startswith("W/"):
        headers["If-Range"] = etag
    try:
        response = _opener().open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and start:
            return _open_http(url, 0, "")
        raise _refuse(url, error.code, str(error.reason)) from error
    except urllib.error.URLError as error:
        raise _unreachable(url, error.reason) from error
    except (http.client.InvalidURL, ValueError) as error:
        raise RemoteError(f"{shown(url)}: this is no URL that can be asked for ({_line(error)}).") from error
    except (OSError, http.client.HTTPException) as error:
        raise Trouble(f"no answer ({_line(error)})") from error
    size, begins = _extent(response.status, response.headers)
    if begins not in (0, start):
        response.close()
        raise RemoteError(f"{shown(url)}: asked for bytes from {start:,} on, the server sent those from {begins:,}.")
    return Answer(
        size=size,
        etag=response.headers.get("ETag", ""),
        modified=response.headers.get("Last-Modified", ""),
        name=response.headers.get_filename() or "",
        start=begins,
        body=response,
    )


def _extent(status: int, headers: email.message.Message) -> tuple[int | None, int]:
    """Size of the whole file, and the first byte of what was sent."""
    match = re.match(r"bytes (\d+)-\d+/(\d+|\*)$", headers.get("Content-Range", "")) if status == 206 else None
    if match is not None:
        return None if match[2] == "*" else int(match[2]), int(match[1])
    length = headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None, 0


def _unreachable(url: str, reason: Any) -> Exception:
    if isinstance(reason, socket.gaierror) and reason.errno != socket.EAI_AGAIN:
        return RemoteError(f"{shown(url)}: no such host ({reason.strerror}). Check the URL.")
    if isinstance(reason, ssl.SSLCertVerificationError):
        return RemoteError(f"{shown(url)}: the server's certificate is not trusted ({reason.verify_message}).")
    return Trouble(f"no answer ({_line(reason) if isinstance(reason, BaseException) else reason})")


# ---------------------------------------------------------------- s3


@functools.cache
def _s3() -> Any:
    """The client of this process; botocore's are safe to share between threads."""
    import botocore.session  # slow to import, and only some sources need it
    from botocore.config import Config

    session = botocore.session.get_session()
    config = Config(
        signature_version=None if session.get_credentials() else botocore.UNSIGNED,
        connect_timeout=TIMEOUT_S,
        read_timeout=TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": 1},  # tries are counted here
    )
    return session.create_client("s3", config=config)


def bucket_and_key(url: str) -> tuple[str, str]:
    """s3://bucket/a/b -> bucket, a/b."""
    bucket, _, key = url[len("s3://") :].partition("/")
    if not bucket:
        raise RemoteError(f"{url} names no bucket. Expected s3://bucket/prefix.")
    return bucket, key


@contextlib.contextmanager
def _s3_errors(url: str) -> Iterator[None]:
    """The errors of botocore as ours."""
    from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError

    try:
        yield
    except ClientError as error:
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 400))
        raise _refuse(url, status, error.response.get("Error", {}).get("Code", "")) from error
    except (ParamValidationError, ValueError) as error:
        raise RemoteError(f"{url}: this is no URL that can be asked for ({_line(error)}).") from error
    except BotoCoreError as error:
        raise Trouble(f"no answer ({_line(error)})") from error


def _open_s3(url: str, start: int, etag: str) -> Answer:
    bucket, key = bucket_and_key(url)
    more = {"Range": f"bytes={start}-"} if start else {}
    with _s3_errors(url):
        answer = _s3().get_object(Bucket=bucket, Key=key, **more)
    match = re.match(r"bytes \d+-\d+/(\d+)$", answer.get("ContentRange", ""))
    found = str(answer.get("ETag", ""))
    is_md5 = re.fullmatch(r'"[0-9a-f]{32}"', found) and "kms" not in answer.get("ServerSideEncryption", "")
    return Answer(
        size=int(match[1]) if match else int(answer["ContentLength"]),
        etag=found,
        md5=found.strip('"') if is_md5 and "SSECustomerAlgorithm" not in answer else "",
        start=start if match else 0,
        body=answer["Body"],
    )


def list_s3(url: str) -> list[Listed]:
    """Every object below s3://bucket/prefix, the prefix being a folder; [] where there is none. Raises RemoteError."""
    bucket, key = bucket_and_key(url)
    prefix = f"{key.rstrip('/')}/" if key.strip("/") else ""

    def attempt() -> list[Listed]:
        with _s3_errors(url):
            pages = _s3().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            found = [row for page in pages for row in page.get("Contents", ())]
        rows = [(row["Key"].removeprefix(prefix), row) for row in found if not row["Key"].endswith("/")]
        return [Listed(path=PurePosixPath(name), size=row["Size"], etag=row["ETag"]) for name, row in rows]

    return _persist(url, attempt, lambda: 0)
