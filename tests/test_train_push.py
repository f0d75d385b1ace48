"""Pushing an export: the checks before, the bytes that arrive at a hub, and what is said when the hub refuses.

In:  folders built here, and a small hub on the loopback that speaks the routes of the real one.
Out: what that hub received, exit codes and messages.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from train import push
from train.push import PushError, check_folder, check_repo

ROOT = Path(__file__).resolve().parent.parent
REPO = "lab/brainloom-debug"
TOKEN = "hf_test"


class Hub(ThreadingHTTPServer):
    """A model hub for one repository: files above 1 kB or named *.safetensors go by LFS, the others in the commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.refuses = 0  # the status to answer every request with, or 0
        self.is_private: bool | None = None  # None: there is no repository yet
        self.requests: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.verified: set[str] = set()
        self.files: dict[str, bytes] = {}
        self.branches = ["main"]

    def commit(self, lines: list[dict[str, Any]]) -> None:
        assert lines[0]["key"] == "header"
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile" and value["oid"] in self.verified
                self.files[value["path"]] = self.blobs[value["oid"]]


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _handle(self) -> None:
        body, hub = self._body(), self.server
        path = self.path.split("?")[0]
        hub.requests.append(f"{self.command} {path}")
        if hub.refuses:
            self._answer({"error": "no"}, hub.refuses)
        elif path.startswith("/upload/"):
            hub.blobs[path.removeprefix("/upload/")] = body
            self._answer({})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid username or password."}, 401)
        else:
            self._answer(*self._route(path, body))

    do_GET = do_POST = do_PUT = _handle

    def _route(self, path: str, body: bytes) -> tuple[Any, int]:
        hub, model = self.server, f"/api/models/{REPO}"
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == model:
            return {"id": REPO, "private": hub.is_private, "tags": [], "downloads": 0}, 200
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---")
            return {"errors": [], "warnings": []}, 200
        if path.startswith(f"{model}/branch/"):
            hub.branches.append(path.rsplit("/", 1)[1])
            return {}, 200
        if path.startswith(f"{model}/preupload/"):
            assert path.rsplit("/", 1)[1] in hub.branches
            return {"files": [_mode(file) for file in json.loads(body)["files"]]}, 200
        if path == f"/{REPO}.git/info/lfs/objects/batch":
            return {"transfer": "basic", "objects": [self._actions(o) for o in json.loads(body)["objects"]]}, 200
        if path == "/verify":
            oid, size = json.loads(body)["oid"], json.loads(body)["size"]
            assert hashlib.sha256(hub.blobs[oid]).hexdigest() == oid and len(hub.blobs[oid]) == size
            hub.verified.add(oid)
            return {}, 200
        if path.startswith(f"{model}/commit/"):
            hub.commit([json.loads(line) for line in body.splitlines()])
            return {"commitUrl": f"{hub.url}/{REPO}/commit/{'a' * 40}", "commitOid": "a" * 40}, 200
        return {"error": f"the test's hub does not know {path}"}, 404

    def _create(self, wanted: dict[str, Any]) -> tuple[Any, int]:
        assert f"{wanted['organization']}/{wanted['name']}" == REPO
        url = {"url": f"{self.server.url}/{REPO}"}
        if self.server.is_private is not None:
            return {"error": "You already created this model repo", **url}, 409
        self.server.is_private = wanted["visibility"] == "private"
        return url, 200

    def _actions(self, wanted: dict[str, Any]) -> dict[str, Any]:
        url = self.server.url
        actions = {"upload": {"href": f"{url}/upload/{wanted['oid']}"}, "verify": {"href": f"{url}/verify"}}
        return {**wanted, "actions": actions}


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    by_lfs = file["path"].endswith(".safetensors")
    return {"path": file["path"], "uploadMode": "lfs" if by_lfs else "regular", "shouldIgnore": False}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def _export(tmp_path: Path, **changes: bytes | None) -> Path:
    folder = tmp_path / "export"
    files: dict[str, bytes | None] = {
        "config.json": b'{"model_type": "brainloom"}\n',
        "README.md": b"---\nlicense: mit\n---\nA card: \xc3\xa9\r\n",
        "model.safetensors": bytes(range(256)) * 4096,
        "code/modeling.py": b"# code\n",
        **{name.replace("__", "/"): content for name, content in changes.items()},
    }
    for name, content in files.items():
        if content is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    return folder


# huggingface_hub 2.4 uploads LFS files by an argument that its own HTTP library deprecates.
CLIENTS_OWN_WARNING = "ignore:Use 'content=<...>' to upload raw:DeprecationWarning"

COMMAND = """
import argparse, sys
from train import push
parser = argparse.ArgumentParser()
push.configure(parser)
sys.exit(push.main(parser.parse_args()))
"""


def _push(tmp_path: Path, url: str, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's client reads its environment when it is imported."""
    clean = {key: value for key, value in os.environ.items() if not re.match("(HF_|HUGGING|.*_proxy|.*_PROXY)", key)}
    own = {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    return subprocess.run(
        [sys.executable, "-W", "error", "-W", CLIENTS_OWN_WARNING, "-c", COMMAND, "--repo", REPO, *argv],
        env={**clean, **own, **env, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_the_hub_receives_is_the_folder_byte_for_byte(tmp_path: Path, hub: Hub) -> None:
    folder = _export(tmp_path)
    done = _push(tmp_path, hub.url, "--hub", str(folder))
    assert (done.returncode, done.stdout) == (0, f"{hub.url}/{REPO}/commit/{'a' * 40}\n"), done.stderr
    assert hub.files == _contents(folder)
    assert hub.is_private is True
    assert len(hub.blobs) == len(hub.verified) == 1, "one file went by LFS, the others in the commit"
    assert TOKEN not in done.stderr


def test_a_repository_that_exists_is_pushed_to_and_a_branch_is_made(tmp_path: Path, hub: Hub) -> None:
    hub.is_private = True
    folder = _export(tmp_path)
    assert _push(tmp_path, hub.url, "--hub", str(folder), "--revision", "v2").returncode == 0
    assert hub.files == _contents(folder)
    assert f"POST /api/models/{REPO}/commit/v2" in hub.requests


def test_a_public_repository_takes_a_push_only_with_public(tmp_path: Path, hub: Hub) -> None:
    hub.is_private = False
    folder = _export(tmp_path)
    refused = _push(tmp_path, hub.url, "--hub", str(folder))
    assert (
        refused.returncode == 2
        and "exists and is public; expected a private repository. Say --public" in refused.stderr
    )
    assert hub.files == {}
    assert _push(tmp_path, hub.url, "--hub", str(folder), "--public").returncode == 0
    assert hub.files == _contents(folder)


def test_a_token_that_is_refused_is_said_without_showing_it(tmp_path: Path, hub: Hub) -> None:
    done = _push(tmp_path, hub.url, "--hub", str(_export(tmp_path)), HF_TOKEN="hf_secret")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"PushError: push: {hub.url} refuses the token for {REPO} (401)" in done.stderr
    assert "Run `hf auth login` again, or set HF_TOKEN" in done.stderr and "hf_secret" not in done.stderr


def test_another_answer_of_the_hub_is_repeated(tmp_path: Path, hub: Hub) -> None:
    hub.refuses = 500
    done = _push(tmp_path, hub.url, "--hub", str(_export(tmp_path)))
    assert done.returncode == 2 and f"PushError: push: {hub.url} answered 500 for {REPO}" in done.stderr


def test_a_hub_that_is_gone_is_named(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        done = _push(tmp_path, url, "--hub", str(_export(tmp_path)))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"PushError: push: {url} cannot be reached" in done.stderr and "HF_ENDPOINT" in done.stderr


def test_without_a_token_nothing_is_asked_of_the_hub(tmp_path: Path, hub: Hub) -> None:
    done = _push(tmp_path, hub.url, "--hub", str(_export(tmp_path)), HF_TOKEN="")
    assert done.returncode == 2
    assert "found no token; expected one with write access to lab/brainloom-debug. Run `hf auth login`" in done.stderr
    assert hub.requests == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config.json": None}, r"found no config\.json; expected a whole export"),
        ({"README.md": None}, r"found no README\.md;"),
        ({"model.safetensors": None}, r"found no model\.safetensors \(or model\.safetensors\.index\.json"),
        ({"pytorch_model.bin": b""}, r"found pytorch_model\.bin; expected no pickles, .* Delete them"),
        ({"a/x.PT": b"", "b.ckpt": b"", "c.pkl": b""}, r"found a/x\.PT, b\.ckpt, c\.pkl; expected no pickles"),
        ({"model.safetensors.index.json": b"{}"}, r"found no `weight_map` .* Run `make export` again"),
        (
            {"model.safetensors.index.json": b'{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}'},
            r"found no model-2\.safetensors; expected a whole export",
        ),
    ],
)
def test_a_folder_that_is_no_export_is_refused(tmp_path: Path, changes: dict[str, bytes | None], message: str) -> None:
    with pytest.raises(PushError, match=message):
        check_folder(_export(tmp_path, **changes))


def test_a_whole_export_passes_sharded_or_not(tmp_path: Path) -> None:
    assert len(check_folder(_export(tmp_path))) == 4
    index = b'{"weight_map": {"a": "model.safetensors"}}'
    assert len(check_folder(_export(tmp_path, **{"model.safetensors.index.json": index}))) == 5
    with pytest.raises(PushError, match=r"nowhere: found no folder; expected an export\. Run `make export"):
        check_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("repo", ["name", "a/b/c", "/b", "a/", "a b/c", "a/b--c", "a/b..c", "a/b.git", "a/" + "b" * 99])
def test_a_repository_name_that_is_not_org_name_is_refused(repo: str) -> None:
    with pytest.raises(PushError, match=r"expected ORG/NAME .* Correct REPO"):
        check_repo(repo)


def test_a_dry_run_lists_the_files_and_sends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    push.configure(parser)
    folder = _export(tmp_path)
    assert push.main(parser.parse_args(["--hub", str(folder), "--repo", REPO, "--dry-run"])) == 0
    printed = capsys.readouterr().out
    assert "      1,048,576 bytes  model.safetensors\n" in printed
    assert printed.endswith(f"-> private repository {REPO}; nothing was sent\n")
    assert push.main(parser.parse_args(["--hub", str(folder), "--repo", "name", "--dry-run"])) == 2
    assert "PushError: push: found the repository 'name'" in capsys.readouterr().err
