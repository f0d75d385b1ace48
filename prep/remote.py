"""Files behind URLs: what a server says of one, and downloads that go on where they broke.

In: https://, http:// and s3:// URLs. Out: bytes, files on local disk; RemoteError, whose one line says what was
answered. S3 itself is prep/s3.py's.
"""

import contextlib
import email.message
import functools
import http.client
import re
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prep import s3
from prep.urls import TIMEOUT_S, Answer, RemoteError, Trouble, persist, refusal, scheme_of, shown, told

PIECE_BYTES = 2**20


def ask(url: str) -> Answer:
    """What the server says of a file. Raises RemoteError."""

    def attempt() -> Answer:
        answer = _open(url, 0, "")
        answer.body.close()
        return answer

    return persist(url, attempt)


def fetch(url: str) -> tuple[bytes, str]:
    """A small file and its ETag. Raises NotThereError, RemoteError."""

    def attempt() -> tuple[bytes, str]:
        answer = _open(url, 0, "")
        with contextlib.closing(answer.body):
            content = b"".join(_pieces(answer.body))
        if answer.size not in (None, len(content)):
            raise Trouble(f"it ended after {len(content):,} of {answer.size:,} bytes")
        return content, answer.etag

    return persist(url, attempt)


def download(url: str, target: Path, known: Answer | None = None) -> None:
    """Bring a file to `target`, of which a part may be there already. Raises RemoteError; OSError of the local disk.

    `known`: what `ask` said, else what is said first; where the server says something else later, nothing is kept.
    """

    def have() -> int:
        return target.stat().st_size if target.exists() else 0

    def attempt() -> None:
        nonlocal known
        start = 0 if known is None or known.size is None or have() > known.size else have()
        if known is None or start != known.size or start == 0:
            answer = _open(url, start, known.etag if known else "")
            known = known or answer
            _bring(url, target, known, answer)
        if known.size is not None and have() != known.size:
            raise Trouble(f"it ended after {have():,} of {known.size:,} bytes")

    persist(url, attempt, have)


def _bring(url: str, target: Path, known: Answer, answer: Answer) -> None:
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
            raise Trouble(f"the connection broke ({told(error)})") from error
        if not piece:
            return
        yield piece


def _open(url: str, start: int, etag: str) -> Answer:
    """Ask for a file from byte `start` on; where the server will not, or the file is another one now, from 0 on."""
    return s3.open_object(url, start) if scheme_of(url) == "s3" else _open_http(url, start, etag)


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
        raise refusal(url, error.code, str(error.reason)) from error
    except urllib.error.URLError as error:
        raise _unreachable(url, error.reason) from error
    except (http.client.InvalidURL, ValueError) as error:
        raise RemoteError(f"{shown(url)}: this is no URL that can be asked for ({told(error)}).") from error
    except (OSError, http.client.HTTPException) as error:
        raise Trouble(f"no answer ({told(error)})") from error
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
    return Trouble(f"no answer ({told(reason) if isinstance(reason, BaseException) else reason})")
