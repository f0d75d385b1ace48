"""What servers have in common: URLs, what they answer, refusals in words, and trying again what may pass.

In: URLs, statuses, errors. Out: Answer, Listed; RemoteError, whose one line says what was answered and what to do.
"""

import re
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, TypeVar

from prep.disk import StoreError

SCHEMES = ("https", "http", "s3")
MAX_TRIES = 5  # without a byte more than before
BACKOFF_S = 1.0  # before the second try; doubles with each
TIMEOUT_S = 60.0  # without a byte
BUSY = (408, 425, 429)  # statuses that pass, as those from 500 on do

T = TypeVar("T")


class RemoteError(StoreError):
    """A file cannot be had from, or brought to, where the URL says; trying again now would not help."""


class NotThereError(RemoteError):
    """The server knows no such file."""


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


def scheme_of(address: str) -> str:
    """The scheme of a URL in small letters; "" of a local path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", address)
    return match[1].lower() if match else ""


def is_url(source: str) -> bool:
    """Whether a source is no local path; RemoteError where it is a URL of a kind that is not read."""
    scheme = scheme_of(source)
    if scheme and scheme not in SCHEMES:
        raise RemoteError(f"{source}: {scheme}:// is not read. SRC is files, folders, https:// or s3:// URLs.")
    return bool(scheme)


def shown(url: str) -> str:
    """A URL without what may be secret: the query of a signed one, user and password."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def persist(url: str, attempt: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
    """Try until it works, or until nothing has moved for MAX_TRIES times. Raises RemoteError."""
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


def told(error: BaseException) -> str:
    """An error as one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def refusal(url: str, status: int, reason: str) -> Exception:
    """The error for an HTTP status of a question."""
    where = f"{shown(url)}: the server answers {status}"
    if status >= 500 or status in BUSY:
        return Trouble(f"the server answers {status} {reason}".rstrip())
    if status in (404, 410):
        return NotThereError(f"{where}: there is no such file. Check the URL.")
    if status in (401, 403):
        what = "it may not be read, or is not there. Check the URL (a signed one may be too old) and the credentials."
        return RemoteError(f"{where}: {what}")
    return RemoteError(f"{where} {reason}".rstrip() + ". Check the URL.")
