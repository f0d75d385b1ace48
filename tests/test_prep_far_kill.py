"""Kill -9 of a whole ingest while it stages an input or sends a session: a rerun ends with the same bytes.

In: small NWB files, a slow web server and a slow S3 server on loopback, `python -m prep ingest`. Out: stores.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mirror_builders
import numpy as np
import pytest
import remote_builders
from mirror_builders import URL, Log, keys, objects
from nwb_builders import running, with_units, write
from remote_builders import Handler, Served, kill_all
from store_builders import tree

from prep.store import Store

ROOT = Path(__file__).parent.parent

nothing_of_this_machine = pytest.fixture(autouse=True)(remote_builders.nothing_of_this_machine)
web = pytest.fixture(remote_builders.web_server)
s3_address = pytest.fixture(scope="module")(remote_builders.s3_server)
bucket = pytest.fixture(remote_builders.empty_bucket)
log = pytest.fixture(mirror_builders.log_of_writes)
credentials = pytest.fixture(mirror_builders.with_credentials)


def recording(folder: Path, name: str, seed: int, num_samples: int = 10_000) -> Path:
    """Spikes and running."""
    rng = np.random.default_rng(seed)

    def fill(nwb: Any) -> None:
        with_units(*(np.sort(rng.uniform(0, 60, 500)) for _ in range(3)))(nwb)
        running(rng.normal(size=num_samples), rate=1000.0)(nwb)

    folder.mkdir(parents=True, exist_ok=True)
    return write(folder, fill, name)


def command(*words: str | Path) -> "subprocess.Popen[str]":
    """`python -m prep ingest` in a session of its own, which can be killed as one."""
    argv = [sys.executable, "-m", "prep", "ingest", *map(str, words), "--dataset", "d1", "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(argv, cwd=ROOT, env=environment, start_new_session=True, **pipes)


def done(process: "subprocess.Popen[str]") -> None:
    told, _ = process.communicate(timeout=200)
    assert process.returncode == 0, told


def killed_when(process: "subprocess.Popen[str]", has_come: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not has_come():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)
    kill_all(process)


def visible(store: Path) -> dict[str, str]:
    return {name: digest for name, digest in tree(store).items() if not name.startswith(".")}


def test_a_kill_while_an_input_is_staged_leaves_no_trace(web: tuple[str, type[Handler]], tmp_path: Path) -> None:
    address, handler = web
    path = recording(tmp_path, "a.nwb", 1, 400_000)  # several pieces of a download
    done(command(path, "--out", tmp_path / "local"))
    served = handler.files["/a.nwb"] = Served(path.read_bytes(), slow_s=0.01)
    store = tmp_path / "store"

    def has_come() -> bool:
        return any(part.stat().st_size > 0 for part in store.glob(".stage/*/part/a.nwb"))

    killed_when(command(f"{address}/a.nwb", "--out", store), has_come)
    assert not list(store.glob("*/*.manifest.json")) and not list(store.glob(".stage/*/whole/*"))
    served.slow_s = 0.0
    handler.requests.clear()
    done(command(f"{address}/a.nwb", "--out", store))
    assert visible(store) == visible(tmp_path / "local")
    assert any(wanted.startswith("bytes=") for _, wanted in handler.requests)  # it went on where it was killed


@pytest.mark.usefixtures("credentials")
def test_a_kill_while_a_session_is_sent_leaves_no_trace(bucket: Any, log: Log, tmp_path: Path) -> None:
    source = tmp_path / "set"
    recording(source, "a.nwb", 1)
    recording(source, "b.nwb", 2)
    done(command(source, "--out", tmp_path / "local"))
    log.slow_s = 0.1
    build = tmp_path / "build"
    for num_sent in (4, 60):  # in the midst of the first session, and of the second
        killed_when(command(source, "--out", URL, "--build", build), lambda n=num_sent: len(keys(bucket)) > n)
        manifests = [name for name in keys(bucket) if name.endswith(".manifest.json")]
        assert len(manifests) == (num_sent > 4) and "catalog.json" not in keys(bucket)
    log.slow_s = 0.0
    time.sleep(1.0)  # what the server was in the midst of
    done(command(source, "--out", URL, "--build", build))
    assert objects(bucket) == visible(tmp_path / "local")
    log.puts.clear()
    done(command(source, "--out", URL, "--build", tmp_path / "of another machine"))
    assert log.puts == ["set/.lock"]


@pytest.mark.slow
@pytest.mark.usefixtures("credentials")
def test_two_commands_at_once_of_different_files_both_end_in_the_catalog(bucket: Any, log: Log, tmp_path: Path) -> None:
    paths = [recording(tmp_path / "set", f"{name}.nwb", seed) for seed, name in enumerate("ab")]
    started = [command(path, "--out", URL, "--build", tmp_path / path.stem) for path in paths]
    for process in started:
        done(process)
    done(command(tmp_path / "set", "--out", tmp_path / "local"))
    assert objects(bucket) == visible(tmp_path / "local")
    assert len(Store(URL).entries) == 2
