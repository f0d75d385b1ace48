"""A web server and an S3 server on loopback; the web server serves files from memory, and misbehaves as asked.

In: the bytes of files by name, and what goes wrong with each. Out: addresses, and the requests that came; bodies of
fixtures, which a test file declares under the names that it uses.
"""

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from prep import remote, s3, urls
from prep.files import RemoteFile, Staging, find_files

PIECE = 2**14


@dataclass
class Served:
    """One file: its bytes, and how it is served."""

    content: bytes
    has_ranges: bool = True
    has_etag: bool = True
    filename: str = ""  # Content-Disposition
    breaks_after: list[int] = field(default_factory=list)  # of each answer in turn: bytes that are sent
    statuses: list[int] = field(default_factory=list)  # of each answer in turn, before it is served at all
    extra_length: int = 0  # that Content-Length says too much
    location: str = ""  # a redirect
    slow_s: float = 0.0  # before each piece


class Handler(BaseHTTPRequestHandler):
    """Serves GET, whole or from a byte on."""

    protocol_version = "HTTP/1.1"
    files: ClassVar[dict[str, Served]] = {}
    requests: ClassVar[list[tuple[str, str]]] = []  # path, Range

    def do_GET(self) -> None:
        served = self.files.get(self.path.partition("?")[0])
        wanted = self.headers.get("Range", "")
        self.requests.append((self.path, wanted))
        self.close_connection = True
        status = 404 if served is None else served.statuses.pop(0) if served.statuses else 0
        if status or served is None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if served.location:
            self.send_response(302)
            self.send_header("Location", served.location)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_file(served, wanted)

    def send_file(self, served: Served, wanted: str) -> None:
        etag = f'"{hashlib.sha256(served.content).hexdigest()[:8]}"'
        match = re.match(r"bytes=(\d+)-$", wanted) if served.has_ranges else None
        start = int(match[1]) if match and self.headers.get("If-Range", etag) == etag else 0
        size = len(served.content)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Length", str(size - start + served.extra_length))
        if served.has_etag:
            self.send_header("ETag", etag)
        if served.filename:
            self.send_header("Content-Disposition", f'attachment; filename="{served.filename}"')
        self.end_headers()
        stop = start + served.breaks_after.pop(0) if served.breaks_after else size
        for first in range(start, stop, PIECE):
            if served.slow_s:
                time.sleep(served.slow_s)
            with contextlib.suppress(ConnectionError):  # who asked may have been killed
                self.wfile.write(served.content[first : min(first + PIECE, stop)])

    def log_message(self, *args: object) -> None:
        pass


def serve() -> tuple[ThreadingHTTPServer, type[Handler], Callable[[], None]]:
    """A server, where its files and requests are, and how to stop it."""
    handler = type("OwnHandler", (Handler,), {"files": {}, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def stop() -> None:
        server.shutdown()
        thread.join()
        server.server_close()

    return server, handler, stop


def nothing_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy, no credentials, no waiting."""
    for name in [name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setattr(urls, "BACKOFF_S", 0.001)
    monkeypatch.setattr(remote, "TIMEOUT_S", 5.0)


def web_server() -> Iterator[tuple[str, type[Handler]]]:
    """A web server: its address, and its handler, where its files and requests are."""
    server, handler, stop = serve()
    yield f"http://127.0.0.1:{server.server_port}", handler
    stop()


def s3_server() -> Iterator[str]:
    """The address of an S3 server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


def empty_bucket(s3_address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty bucket `lab`, and a client to fill it."""
    import botocore.session

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_address)
    s3.forget_clients()
    own = botocore.session.get_session()
    own.set_credentials("testing", "testing")
    client = own.create_client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="lab")
    yield client
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="lab"):
        for row in page.get("Contents", []):
            client.delete_object(Bucket="lab", Key=row["Key"])
    client.delete_bucket(Bucket="lab")
    client.close()
    s3.forget_clients()


def one(url: str, tmp_path: Path, is_kept: bool = False) -> RemoteFile:
    (file,) = find_files([url], None, staging=Staging(folder=tmp_path / "stage", is_kept=is_kept))
    return file.remotes[0]


def put(bucket: Any, key: str, body: bytes, acl: str = "public-read") -> None:
    bucket.put_object(Bucket="lab", Key=key, Body=body, ACL=acl)


def kill_all(process: "subprocess.Popen[str]") -> None:
    """Kill -9 a command that was started in a session of its own, with its workers."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
