"""One ingest among others: its lock, and what dead ones left behind.

In: a store. Out: a run's name, held by a lock that dies with the process; a store without leftovers.
"""

import contextlib
import fcntl
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from prep.catalog import read_manifest
from prep.disk import ShardFormatError, StoreError, locked, read_json
from prep.files import STAGE
from prep.frames import PARTIAL
from prep.store import manifest_path


@contextlib.contextmanager
def run_of_its_own(root: Path) -> Iterator[str]:
    """A name for this run, held by a lock that the kernel drops when the run dies; sweeps what dead runs left."""
    name = uuid.uuid4().hex[:12]
    lock = root / ".runs" / name
    with contextlib.ExitStack() as stack:
        with locked(root):
            lock.parent.mkdir(exist_ok=True)
            sweep(root)
            file = stack.enter_context(open(lock, "w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield name
        finally:
            with locked(root):
                lock.unlink(missing_ok=True)
                sweep(root)


def sweep(root: Path) -> None:
    """Remove the partial folders of runs that are dead, and folders that were never sealed."""
    for lock in (root / ".runs").iterdir():
        with open(lock, "a") as file, contextlib.suppress(BlockingIOError):  # its run is alive
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.unlink()
    alive = {lock.name for lock in (root / ".runs").iterdir()}
    for folder in root.glob("*/*.zarr"):
        is_partial = folder.name.startswith(".")
        run = folder.name.removesuffix(PARTIAL).rsplit(".", 1)[-1]
        if (is_partial and run not in alive) or (not is_partial and is_unsealed(folder)):
            shutil.rmtree(folder, ignore_errors=True)
            manifest_path(folder).unlink(missing_ok=True)
    for leftover in [*root.glob(".catalog.json.*"), *root.glob(".failed.jsonl.*"), *root.glob("*/.*.manifest.json.*")]:
        leftover.unlink(missing_ok=True)  # writers hold the store's lock, and so do we: nobody is writing these


def tidy(root: Path) -> None:
    """Sweep once more when the workers are gone: a task that was running when its session failed may have written."""
    with locked(root):
        sweep(root)


def is_unsealed(folder: Path) -> bool:
    """A session or stimulus of ours whose seal is missing (a run was killed just before it) or damaged."""
    try:
        if manifest_path(folder).exists():
            return not read_manifest(manifest_path(folder))
        return (folder / "zarr.json").is_file() and "brainloom" in read_json(folder / "zarr.json")["attributes"]
    except ShardFormatError:
        raise  # of a version that we do not know: not ours to remove
    except (StoreError, KeyError, TypeError):  # damaged: made again
        return True


def check_is_store(root: Path) -> None:
    """Refuse to write into a folder that holds something else: ingest removes leftovers in its store."""
    if root.exists() and not root.is_dir():
        raise StoreError(f"{root} is a file; --out is the folder of a token store.")
    is_ours = (root / ".lock").exists() or (root / "catalog.json").exists()
    if root.is_dir() and any(path.name != STAGE for path in root.iterdir()) and not is_ours:
        raise StoreError(f"{root} is neither empty nor a token store (it has no catalog.json). Give another --out.")
