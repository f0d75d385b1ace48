"""Files of a store: written whole or not at all, read back with a version check, digested, under one lock.

In: bytes, JSON. Out: files that appear at once; StoreError and its kinds, whose messages say what to do.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from prep.settings import FORMAT_VERSION

Entry = dict[str, Any]  # what a manifest says of a file: bytes, sha256
NUM_SYNCS = 8  # at once
_GATHERED: ContextVar[dict[Path, Entry] | None] = ContextVar("files to be made durable together", default=None)


# What a person can do about a disk, by the number of its error.
DISKS = {
    errno.ENOSPC: "the disk is full. Free some of it, or give another",
    errno.EDQUOT: "your share of the disk is used up. Free some of it, or give another",
    errno.EROFS: "the disk can only be read. Give another",
    errno.EACCES: "you may not read or write there. Ask whom it belongs to, or give another",
    errno.EPERM: "you may not read or write there. Ask whom it belongs to, or give another",
    errno.ENOTDIR: "a file is in the place of a folder. Give another",
    errno.EIO: "the disk, or the server that holds it, does not answer. Check it, or give another",
    errno.ESTALE: "the disk, or the server that holds it, does not answer. Check it, or give another",
    errno.EMFILE: "too many files are open. Allow more (ulimit -n)",
}


def in_words(error: OSError) -> str:
    """What is the matter with a disk, and what to do; "" where the error is not a disk's."""
    if error.errno not in DISKS:
        return ""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{DISKS[error.errno]}. What is sealed stays: run the same command again to go on."


class StoreError(ValueError):
    """The store cannot be read or written as asked; the message says what to do."""


class ShardFormatError(StoreError):
    """The store is of a version that this code does not know."""


class DigestError(StoreError):
    """The bytes on disk are not the bytes that were written."""


@contextlib.contextmanager
def appears_whole(path: Path) -> Iterator[Path]:
    """Where to write what becomes `path` when the block ends well: temporary name, fsync, rename."""
    with _renamed(path) as temporary:
        yield temporary
        _sync(temporary)


def write_bytes(path: Path, content: bytes | memoryview, is_kept: bool = True) -> Entry:
    """Write a file atomically. Returns what a manifest says of it."""
    return write_parts(path, [content], is_kept)


def write_parts(path: Path, parts: Iterable[bytes | memoryview], is_kept: bool = True) -> Entry:
    """Write a file atomically, part by part. Returns what a manifest says of it, made while each part is warm.

    It survives a power cut when this returns, or at the end of `written_together`; never where it is not `is_kept`.
    """
    digest, size, gathered = hashlib.sha256(), 0, _GATHERED.get()
    with _renamed(path) as temporary, open(temporary, "wb") as file:
        for part in parts:
            digest.update(part)
            size += file.write(part)
        if is_kept and gathered is None:
            file.flush()
            os.fsync(file.fileno())
    entry = {"bytes": size, "sha256": digest.hexdigest()}
    if is_kept and gathered is not None:
        gathered[path] = entry
    return entry


@contextlib.contextmanager
def written_together() -> Iterator[dict[Path, Entry]]:
    """Make the files that this thread writes in the block durable when it ends, all at once; gives them by path.

    Each fsync waits for a commit of the file system, and those at the same time share one. Whoever writes does this
    itself: the fsync of another machine would not reach what is still in this one's memory.
    """
    gathered: dict[Path, Entry] = {}
    token = _GATHERED.set(gathered)
    try:
        yield gathered
    finally:
        _GATHERED.reset(token)
    _sync_all(gathered)


def _sync_all(paths: Iterable[Path]) -> None:
    with ThreadPoolExecutor(NUM_SYNCS) as pool:
        for _ in pool.map(_sync, paths):
            pass  # an error of any is raised here


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _renamed(path: Path) -> Iterator[Path]:
    if not os.path.isdir(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def files_below(folder: Path) -> list[str]:
    """The files below a folder, by their relative paths, sorted."""
    paths = [os.path.join(here, name) for here, _, names in os.walk(folder) for name in names]
    return sorted(path.removeprefix(f"{folder}/") for path in paths if os.path.isfile(path))


def json_bytes(content: Any) -> bytes:
    """Canonical JSON (sorted keys): same content, same bytes."""
    return (json.dumps(content, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def write_json(path: Path, content: Any) -> None:
    """Write canonical JSON."""
    write_bytes(path, json_bytes(content))


def read_json(path: Path) -> Any:
    """Read a JSON file of the store; a version that this code does not know is refused."""
    try:
        return parse_json(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise StoreError(
            f"{path} is missing. Is this a token store? Run `make prep SRC=… OUT={path.parent}` to make one."
        ) from error


def parse_json(text: bytes, where: str) -> Any:
    """The content of a JSON file of the store that is read already; `where` names it in messages."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise StoreError(
            f"{where} is not valid JSON ({error}). Run `make verify STORE=…`, then `make prep` again."
        ) from error
    if isinstance(content, dict) and content.get("format", FORMAT_VERSION) != FORMAT_VERSION:
        raise ShardFormatError(
            f"{where} is format version {content['format']}; this code reads [{FORMAT_VERSION}]. "
            'Update the code, or run `make prep` again (FORMAT.md, "Versions").'
        )
    return content


def sha256(path: Path) -> str:
    """Digest of one file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the store's lock: two ingests may run at once, only one writes the catalog at a time."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
