"""Stages what lies behind a URL on a local disk, once: locked, whole, checked, and removed when its session is sealed.

In: a RemoteFile. Out: the file at its path, and its Source; a record of what the server called those bytes, so that a
later run need not bring them again.

    <stage>/<digest of the URL>/part/<name>    what has come so far; a later run goes on from there
    <stage>/<digest of the URL>/whole/<name>   what is read
    <stage>/<digest of the URL>/part.json, record.json   which bytes these are, by size and ETag (or date)
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prep.catalog import Source
from prep.disk import StoreError, locked, read_json, write_json
from prep.files import RemoteFile
from prep.remote import ask, download
from prep.s3 import NUM_STREAMS, list_objects
from prep.urls import Answer, Listed, RemoteError, shown
from prep.write_session import source_of

RESERVE_BYTES = 2**28  # of the disk, that stay free
PIECE = ".brainloom-part"


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a server has, before it is brought."""

    size: int | None
    fingerprint: str  # "" where nothing tells the bytes from others of that size
    answer: Answer | None = None
    objects: tuple[Listed, ...] = ()


def known_source(remote: RemoteFile) -> Source | None:
    """The Source of a file that an earlier run has read, if the server says that it is the same; else None.

    Raises RemoteError where the file cannot be had.
    """
    record = _read(remote.place / "record.json")
    return _recorded(record) if record and _fits(record, look(remote)) else None


def stage(remote: RemoteFile) -> Source:
    """Make the file be whole at its path; whoever else wants it waits. Returns its Source.

    Raises RemoteError where it cannot be had, StoreError where the disk is too small.
    """
    with locked(remote.place):
        offer = look(remote)
        record = _read(remote.place / "record.json")
        if _fits(record, offer) and remote.path.exists() and source_of(remote.path) == _recorded(record):
            return _recorded(record)
        part = remote.place / "part" / remote.name
        if not _fits(_read(remote.place / "part.json"), offer):
            _remove(part.parent)
        _check_space(remote, offer, _size(part))
        part.parent.mkdir(exist_ok=True)
        write_json(remote.place / "part.json", {"fingerprint": offer.fingerprint})
        if remote.is_folder:
            _bring_folder(remote, offer, part)
        else:
            assert offer.answer is not None
            download(remote.url, part, offer.answer)
            _check_md5(remote, part, offer.answer.md5)
        source = source_of(part)
        write_json(remote.place / "record.json", {"fingerprint": offer.fingerprint, "source": asdict(source)})
        _remove(remote.path.parent)
        part.parent.rename(remote.path.parent)
        return source


def look(remote: RemoteFile) -> Offer:
    """What the server has now."""
    if not remote.is_folder:
        answer = ask(remote.url)
        return Offer(size=answer.size, fingerprint=answer.fingerprint, answer=answer)
    objects = tuple(list_objects(remote.url))
    if not objects:
        raise RemoteError(f"{shown(remote.url)}: there is nothing below it any more. Check the URL.")
    for row in objects:
        if not row.path.parts or {"..", ""} & set(row.path.parts) or row.path.is_absolute():
            raise RemoteError(f"{shown(remote.url)}: the object {row.path.as_posix()!r} would leave its folder.")
    listing = "".join(f"{row.path.as_posix()} {row.size} {row.etag}\n" for row in objects)
    digest = hashlib.sha256(listing.encode()).hexdigest()
    return Offer(size=sum(row.size for row in objects), fingerprint=digest, objects=objects)


def release(remotes: Sequence[RemoteFile], root: Path) -> None:
    """Forget staged files whose session is sealed; while another ingest runs in the store, it may still read them."""
    if _num_live_runs(root) <= 1:
        discard(remotes)


def discard(remotes: Sequence[RemoteFile]) -> None:
    """Remove staged files that nobody will read: what is in them is refused."""
    for remote in remotes:
        if not remote.is_kept and remote.place.is_dir():
            with locked(remote.place):
                _remove(remote.path.parent)


def _bring_folder(remote: RemoteFile, offer: Offer, part: Path) -> None:
    """Bring all objects of an NWB-Zarr folder; one that is there under its own name is whole."""

    def bring(row: Listed) -> None:
        path = part / row.path
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        piece = path.with_name(path.name + PIECE)
        url = f"{remote.url}/{row.path.as_posix()}"
        answer = ask(url)
        if (answer.size, answer.etag) != (row.size, row.etag):
            raise RemoteError(f"{shown(url)}: it changed while it was being read. Run the same command again.")
        download(url, piece, answer)
        _check_md5(remote, piece, answer.md5)
        piece.rename(path)

    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        for _ in pool.map(bring, offer.objects):
            pass


def _check_md5(remote: RemoteFile, path: Path, md5: str) -> None:
    if not md5:
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != md5:
        path.unlink()
        raise RemoteError(
            f"{shown(remote.url)}: the bytes that came are not those of its ETag (md5 {found}, expected {md5}). "
            "Run the same command again."
        )


def _check_space(remote: RemoteFile, offer: Offer, have: int) -> None:
    missing = (offer.size or 0) - have
    free = shutil.disk_usage(remote.place).free
    if missing > free - RESERVE_BYTES:
        raise StoreError(
            f"{shown(remote.url)} has {offer.size or 0:,} bytes, {missing:,} more than are staged, and "
            f"{remote.stage} has {free:,} free. Give --stage a folder on a larger disk."
        )


def _read(path: Path) -> Any:
    """A record, None where there is none that can be trusted."""
    with contextlib.suppress(StoreError):  # missing or damaged: the file is brought again
        return read_json(path)
    return None


def _fits(record: Any, offer: Offer) -> bool:
    """Whether a record is about the bytes that the server has now."""
    return bool(offer.fingerprint) and isinstance(record, dict) and record.get("fingerprint") == offer.fingerprint


def _recorded(record: Any) -> Source:
    return Source(**record["source"])


def _size(part: Path) -> int:
    """Bytes of a file, or of all files of a folder; 0 where there is none."""
    if part.is_dir():
        return sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
    return part.stat().st_size if part.exists() else 0


def _remove(folder: Path) -> None:
    """Remove a folder, by a name first that nobody takes for data."""
    if folder.exists():
        trash = folder.with_name(f".{folder.name}.trash")
        shutil.rmtree(trash, ignore_errors=True)
        os.replace(folder, trash)
        shutil.rmtree(trash, ignore_errors=True)


def _num_live_runs(root: Path) -> int:
    """How many ingests hold a lock in the store."""
    return sum(_is_locked(path) for path in (root / ".runs").glob("*"))


def _is_locked(path: Path) -> bool:
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:  # its run is alive
        return True
    except FileNotFoundError:
        return False  # the run ended just now
    return False
