"""The files of a store, in a folder or far away: an object store is read through a checked cache on this disk.

In: a store's address; names of files and their seals (bytes, sha256). Out: open local files. A far file is fetched
whole and once, checked on arrival, and named by its digest: processes, runs and stores share it; the longest unused go.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from prep.disk import DigestError, StoreError, appears_whole, sha256
from prep.remote import download, fetch
from prep.urls import SCHEMES, NotThereError, scheme_of, shown

MEND = "Delete the .manifest.json beside its .zarr folder, then run `make prep` again."
FOLDER = "BRAINLOOM_CACHE"  # environment: where the cache lies
LIMIT_GB = "BRAINLOOM_CACHE_GB"  # environment: how large it may become
DEFAULT_GB = 64.0
ABANDONED_S = 3600.0  # a part of a file that nobody has touched for so long has lost its writer
SCAN_SHARE = 1024  # the cache is measured again when this process has added one part in so many of its limit

Entry = Mapping[str, Any]  # what a manifest says of a file: sha256, and bytes where it is known


class Files(Protocol):
    """The files below a store's root."""

    @property
    def root(self) -> Path:
        """The store's folder; of a far store nothing but its name."""
        ...

    @property
    def address(self) -> str:
        """What opens the same store in another process."""
        ...

    def where(self, name: str) -> str:
        """How a message names a file."""
        ...

    def latest(self, name: str) -> bytes:
        """A file that has no seal, as it is now. Raises FileNotFoundError."""
        ...

    def open(self, name: str, entry: Entry) -> BinaryIO:
        """A sealed file. Raises FileNotFoundError."""
        ...

    def is_stray(self, name: str) -> bool:
        """Whether a file lies here that no manifest lists."""
        ...

    def forget(self, entry: Entry) -> bool:
        """Drop a copy that has turned out to be damaged; False where there is nothing but the original."""
        ...


@dataclass(frozen=True)
class LocalFiles:
    """A store in a folder."""

    root: Path

    @property
    def address(self) -> str:
        """The folder, from the root of the disk."""
        return str(self.root.resolve())

    def where(self, name: str) -> str:
        """Its path."""
        return str(self.root / name)

    def latest(self, name: str) -> bytes:
        """Its bytes."""
        return (self.root / name).read_bytes()

    def open(self, name: str, entry: Entry) -> BinaryIO:
        """The file itself; who reads it checks it."""
        return open(self.root / name, "rb")

    def is_stray(self, name: str) -> bool:
        """Whether it exists."""
        return (self.root / name).exists()

    def forget(self, entry: Entry) -> bool:
        """There is no copy to drop."""
        return False


@dataclass(frozen=True)
class Sealed:
    """A folder of a store and what its manifest lists of it; `prefix` is the part of it that is looked at."""

    files: Files
    folder: str  # from the store's root
    entries: Mapping[str, Entry]
    prefix: str = ""

    def below(self, name: str) -> "Sealed":
        """One of its folders."""
        return Sealed(self.files, self.folder, self.entries, f"{self.prefix}{name}/")

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.entries

    def where(self, name: str = "") -> str:
        """How a message names one of its files."""
        return self.files.where(self._path(name))

    def open(self, name: str) -> BinaryIO:
        """One of its files, unread. Raises StoreError where it is not listed, DigestError where it is missing."""
        if name not in self:
            raise StoreError(f"{self.where()} has no {name}.")
        try:
            return self.files.open(self._path(name), self.entries[self.prefix + name])
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DigestError(f"{self.where(name)} is missing. {MEND}") from error

    def read(self, name: str) -> bytes:
        """The bytes of one of its files, checked. Raises StoreError where it is not listed, DigestError."""
        for _ in range(2):  # a damaged copy is dropped and fetched again
            with self.open(name) as file:
                content = file.read()
            if hashlib.sha256(content).hexdigest() == self.entries[self.prefix + name]["sha256"]:
                return content
            if not self.forget(name):
                break
        raise DigestError(f"{self.where(name)} is missing or damaged (sha256 differs from the manifest). {MEND}")

    def is_stray(self, name: str) -> bool:
        """Whether a file lies here that the manifest does not list."""
        return name not in self and self.files.is_stray(self._path(name))

    def forget(self, name: str) -> bool:
        """Drop a damaged copy of one of its files; False where there is nothing but the original."""
        return self.files.forget(self.entries[self.prefix + name])

    def _path(self, name: str) -> str:
        return f"{self.folder}/{self.prefix}{name}".strip("/")


def open_files(address: str | Path) -> Files:
    """The files of a store by its folder or its URL (s3://, https://)."""
    if isinstance(address, Path) or not scheme_of(address):
        return LocalFiles(Path(address))
    if scheme_of(address) not in SCHEMES:
        raise StoreError(
            f"{shown(address)}: {scheme_of(address)}:// is not read. A store is a folder, s3:// or https://."
        )
    return CachedFiles(address.rstrip("/"), cache_folder(), cache_limit())


def cache_folder() -> Path:
    """Where far files are kept: BRAINLOOM_CACHE, or the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(FOLDER) or Path(base) / "brainloom").absolute()


def cache_limit() -> int:
    """Bytes that the cache may hold: BRAINLOOM_CACHE_GB."""
    text = os.environ.get(LIMIT_GB) or str(DEFAULT_GB)
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise StoreError(f"{LIMIT_GB}={text!r} is no size. Give a number of gigabytes, for instance {LIMIT_GB}=200.")
    return int(float(text) * 1e9)


# ---------------------------------------------------------------- far away


@dataclass
class CachedFiles:
    """A store at a URL, whose sealed files are kept in `folder` as `<2 hex digits>/<sha256>`.

    All processes of a machine share the folder: a file appears whole, by rename; one process fetches it while those
    that want it too wait; what is evicted while it is mapped lives on until it is let go.
    """

    url: str
    folder: Path
    limit_bytes: int
    _unmeasured: int = field(default=-1, repr=False)  # bytes that were added since the last look; -1 = never looked

    @property
    def root(self) -> Path:
        """The URL as a path: good for its name alone."""
        return Path(self.url)

    @property
    def address(self) -> str:
        """The URL."""
        return self.url

    def where(self, name: str) -> str:
        """Its URL."""
        return f"{shown(self.url)}/{name}"

    def latest(self, name: str) -> bytes:
        """Its bytes now, past the cache."""
        try:
            return fetch(f"{self.url}/{name}")[0]
        except NotThereError as error:
            raise FileNotFoundError(self.where(name)) from error

    def open(self, name: str, entry: Entry) -> BinaryIO:
        """The copy in the cache, fetched where there is none yet. Raises FileNotFoundError, StoreError."""
        place = self._place(name, entry)
        try:
            kept = self._kept(place, entry)
            if kept is None:
                with self._fetching(place):
                    kept = self._kept(place, entry) or self._fetch(name, entry, place)
        except FileNotFoundError:  # of the far file
            raise
        except OSError as error:
            raise StoreError(
                f"The cache {self.folder} cannot be used ({error}). Free some disk, or set {FOLDER} to another "
                f"folder or {LIMIT_GB} to less than {self.limit_bytes / 1e9:g}."
            ) from error
        return kept

    def is_stray(self, name: str) -> bool:
        """A far store is not searched: what the manifest does not list is not read."""
        return False

    def forget(self, entry: Entry) -> bool:
        """Drop the copy."""
        self._place("", entry).unlink(missing_ok=True)
        return True

    def _place(self, name: str, entry: Entry) -> Path:
        digest = str(entry["sha256"])
        if not re.fullmatch(r"[0-9a-f]{64}", digest):  # it becomes a path
            raise DigestError(f"{self.where(name)}: {digest!r} in its manifest is no sha256. The store is damaged.")
        return self.folder / digest[:2] / digest

    def _kept(self, place: Path, entry: Entry) -> BinaryIO | None:
        try:
            file = open(place, "rb")  # noqa: SIM115 (the caller closes it)
        except FileNotFoundError:  # not brought yet, or evicted
            return None
        if os.fstat(file.fileno()).st_size != entry.get("bytes", os.fstat(file.fileno()).st_size):
            file.close()
            return None
        os.utime(file.fileno())  # the time of its last use: access times are often switched off
        return file

    def _fetch(self, name: str, entry: Entry, place: Path) -> BinaryIO:
        self._make_room(int(entry.get("bytes", 0)))
        with appears_whole(place) as temporary:
            self._transfer(name, entry, temporary)
            self._unmeasured += temporary.stat().st_size
            return open(temporary, "rb")  # before it gets the name by which others may evict it

    def _transfer(self, name: str, entry: Entry, target: Path) -> None:
        """Copy a far file whole, and once more where it arrived damaged. Raises FileNotFoundError, StoreError."""
        for _ in range(2):
            try:
                download(f"{self.url}/{name}", target)
            except NotThereError as error:
                raise FileNotFoundError(self.where(name)) from error
            found = sha256(target)
            if found == entry["sha256"]:
                return
        raise DigestError(
            f"{self.where(name)} is not what its manifest says: its sha256 is {found}, expected {entry['sha256']}. "
            "Its session is being made again, or the file is damaged. Open the store anew when no `make prep` works on "
            "it; if that does not help, run `make verify STORE=…`."
        )

    @contextlib.contextmanager
    def _fetching(self, place: Path) -> Iterator[None]:
        """One process fetches a file; the lock dies with its holder."""
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(place.parent / ".lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, needed: int) -> None:
        """Remove the longest unused files until `needed` bytes fit; measured anew now and then, as others add too."""
        margin = self.limit_bytes // SCAN_SHARE
        if self._unmeasured >= 0 and self._unmeasured + needed < margin:
            return
        found = sorted(_copies(self.folder))
        total = sum(size for _, size, _ in found)
        for _, size, path in found:
            if total + needed + margin <= self.limit_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
        self._unmeasured = 0


def _copies(folder: Path) -> Iterator[tuple[int, int, Path]]:
    """Time of last use, bytes and path of each file of the cache; sweeps what dead processes left half written."""
    for place in folder.glob("[0-9a-f][0-9a-f]/*"):
        try:
            found = place.stat()
        except FileNotFoundError:  # evicted by another process just now
            continue
        if not place.name.startswith("."):
            yield found.st_mtime_ns, found.st_size, place
        elif place.name != ".lock" and time.time() - found.st_mtime > ABANDONED_S:
            place.unlink(missing_ok=True)
