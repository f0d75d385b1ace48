"""Files of a store: written whole or not at all, read back with a version check, digested, under one lock.

In: bytes, JSON. Out: files that appear at once; StoreError and its kinds, whose messages say what to do.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prep.settings import FORMAT_VERSION


class StoreError(ValueError):
    """The store cannot be read or written as asked; the message says what to do."""


class ShardFormatError(StoreError):
    """The store is of a version that this code does not know."""


class DigestError(StoreError):
    """The bytes on disk are not the bytes that were written."""


@contextlib.contextmanager
def appears_whole(path: Path) -> Iterator[Path]:
    """Where to write what becomes `path` when the block ends well: temporary name, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, *parts: bytes | memoryview) -> dict[str, Any]:
    """Write a file atomically. Returns what a manifest says of it, {bytes, sha256}, made while the bytes are warm."""
    digest, size = hashlib.sha256(), 0
    with appears_whole(path) as temporary, open(temporary, "wb") as file:
        for part in parts:
            digest.update(part)
            size += file.write(part)
    return {"bytes": size, "sha256": digest.hexdigest()}


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
