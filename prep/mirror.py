"""A store in a bucket, built in a folder: each session is sent when it is sealed, and its bytes leave this disk.

In: an s3:// URL, a folder that all workers see, sealed sessions and stimuli in it. Out: the same store at the URL.

The bucket holds what a local store's folder would, byte for byte. A session's files go first, its manifest when the
server lists all of them, the catalog at the end of the run, derived from the manifests in the bucket by a write that
fails where another run has written it since. In the folder the manifest stays, and a session that was sent is `away`.
"""

import contextlib
import hashlib
import random
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from prep import catalog
from prep.catalog import AWAY, MANIFEST, is_away, manifests, read_manifest, sealed_folder
from prep.disk import ShardFormatError, StoreError, json_bytes, locked, parse_json, write_bytes, write_json
from prep.frames import STIMULI
from prep.remote import fetch
from prep.s3 import (
    ABSENT,
    NUM_STREAMS,
    OutrunError,
    bucket_and_key,
    check_credentials,
    list_objects,
    put_bytes,
    put_file,
    remove,
)
from prep.store import CATALOG, FAILURES, manifest_path
from prep.urls import Listed, NotThereError, RemoteError, scheme_of, shown

BUILDS = ".builds.json"  # in the folder: for which URL
OURS = ".lock"  # in the bucket, as in a local store: what is here is a store, whole or not
ROOT = "zarr.json"  # stays of a session that is away: a rerun tells what is in it
MAX_OUTRUNS = 50  # other runs that wrote the catalog first
PAUSE_S = 1.0  # at most, after each

There = Mapping[str, Listed]  # what the bucket holds, by name below the URL
T = TypeVar("T")


class OtherRecordingError(RemoteError):
    """Another run has sent another recording under the name that this one has here."""


def destination(out: str, build: Path | None) -> "tuple[Path, Mirror | None]":
    """The folder that is written, and the mirror where `out` is a URL. Raises StoreError."""
    scheme = scheme_of(out)
    if not scheme:
        if build is not None:
            raise StoreError(f"--build {build} is for a store in a bucket; --out {out} is a folder. Leave it out.")
        if (Path(out) / BUILDS).exists():
            raise StoreError(f"--out {out} is where a store in a bucket is built. Give another folder.")
        return Path(out), None
    if scheme != "s3":
        raise StoreError(
            f"--out {shown(out)}: {scheme}:// cannot be written. Give a folder or s3://bucket/prefix "
            "(AWS_ENDPOINT_URL names a server other than Amazon's)."
        )
    url = f"s3://{out[len('s3://') :].strip('/')}"
    name = "-".join(part for part in bucket_and_key(url) if part).replace("/", "-")[:60]
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    folder = (build or Path("build") / f"{name}-{digest}").resolve()
    return folder, Mirror(url=url, build=folder)


@dataclass(frozen=True, kw_only=True)
class Mirror:
    """A store in a bucket, and the folder in which it is built."""

    url: str
    build: Path

    # ------------------------------------------------------------ before the run

    def gather(self, *, is_dry: bool = False) -> None:
        """Send what an earlier run could not; make what is whole in the bucket count as there, and nothing else.

        Raises RemoteError, StoreError, OSError.
        """
        self._claim(is_dry)
        if not is_dry:
            self._send_rest()
        with locked(self.build):  # else another run, here, might send one between the listing and what follows
            there = self._there()
            names = sorted(name for name in there if is_manifest(name))
            for path in self.build.glob(f"*/*{MANIFEST}"):
                name = path.relative_to(self.build).as_posix()
                if name not in there and is_away(sealed_folder(path)):
                    _forget(path)
            each(names, lambda name: self._take(name, there))

    def _claim(self, is_dry: bool) -> None:
        """See that the folder is for this URL, and that the URL is a store's, or empty, and may be written."""
        known = self.build / BUILDS
        if known.exists() and (found := parse_json(known.read_bytes(), str(known))) != {"url": self.url}:
            raise StoreError(f"{self.build} is where {found['url']} is built. Give --build another folder.")
        if not known.exists() and self.build.is_dir() and any(self.build.iterdir()):
            raise StoreError(f"--build {self.build} holds something else. Give a new folder, or an empty one.")
        write_json(known, {"url": self.url})
        if is_dry:
            return
        check_credentials(self.url)
        names = self._there() if self._text(OURS) is None else {}
        if names and not any(name in (OURS, CATALOG) or is_manifest(name) for name in names):  # OURS: since we asked
            raise StoreError(
                f"{self.url} is neither empty nor a token store (it has no {CATALOG}). Give another --out."
            )
        put_bytes(f"{self.url}/{OURS}", b"")  # the first write: who may not write is told before the work begins

    def _there(self) -> dict[str, Listed]:
        return {row.path.as_posix(): row for row in list_objects(self.url)}

    def _take(self, name: str, there: There) -> None:
        """Know a session or stimulus that is whole in the bucket; forget one that is not."""
        path = self.build / name
        folder = sealed_folder(path)
        if path.exists() and folder.is_dir() and not is_away(folder):
            return  # sealed here and not sent yet: `send` sees to it
        text = self._manifest(name, there)
        if whole(text, f"{self.url}/{name}", there) is None:
            _forget(path)
            return
        if not path.exists() or path.read_bytes() != text:
            _forget(path)
            write_bytes(folder / AWAY, b"")
            write_bytes(folder / ROOT, fetch(f"{self.url}/{folder_of(name)}/{ROOT}")[0])
            write_bytes(path, text)  # last: without it the folder is a leftover
        _sweep(folder)  # a run that was killed left the rest

    def _manifest(self, name: str, there: There) -> bytes:
        """A manifest of the bucket, which need not be brought where this folder has the same."""
        path = self.build / name
        if path.exists():
            text = path.read_bytes()
            if there[name].etag == f'"{hashlib.md5(text, usedforsecurity=False).hexdigest()}"':
                return text
        return fetch(f"{self.url}/{name}")[0]

    # ------------------------------------------------------------ a session that is sealed

    def _send_rest(self) -> None:
        """Send what an earlier run has sealed and did not send."""
        for path, _ in list(manifests(self.build)):
            if sealed_folder(path).is_dir():
                with contextlib.suppress(OtherRecordingError):  # forgotten here: this run makes it under another name
                    self.send(sealed_folder(path).relative_to(self.build).as_posix())

    def send(self, folder: str) -> None:
        """Send a sealed session or stimulus, and what it shows before it; then its bytes leave this disk.

        Raises RemoteError, DigestError, OSError.
        """
        here = self.build / folder
        with locked(self.build / ".sending" / hashlib.sha256(folder.encode()).hexdigest()[:16]):
            if is_away(here):
                return
            text = manifest_path(here).read_bytes()
            content = read_manifest(manifest_path(here))
            for stream in content.get("session", {"streams": ()})["streams"]:
                if stream["stimulus"] is not None:
                    self.send(f"{STIMULI}/{stream['stimulus']}.zarr")
            self._make_way(folder, content, text)
            self._send_files(folder, content["files"])
            self._seal(folder, text)
            self._leave(here, text)

    def _make_way(self, folder: str, content: dict[str, Any], text: bytes) -> None:
        """Unseal what is there of another content, and take it out of the catalog first: nobody is to begin with it."""
        name = manifest_of(folder)
        found = self._text(name)
        if found is None or found == text:
            return
        theirs = _recordings(whole(found, f"{self.url}/{name}", None))
        if theirs and not theirs & _recordings(content):
            with locked(self.build):
                _forget(self.build / name)
            raise OtherRecordingError(
                f"{self.url}/{folder} is of another recording ({', '.join(sorted(theirs))}), which another run sent in "
                "the meantime. Run the same command again: this one gets a name of its own."
            )
        self.publish(without=folder)
        remove(f"{self.url}/{name}")
        self.publish(without=folder)  # another run may just have listed it once more

    def _send_files(self, folder: str, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Send what is not there yet, remove what does not belong there, and see that the server lists just that."""
        url, here = f"{self.url}/{folder}", self.build / folder
        there = {row.path.as_posix(): row for row in list_objects(url)}
        etags = {name: row.etag for name, row in there.items() if _is_same(here / name, files.get(name), row)}

        def send(name: str) -> None:
            etags[name] = put_file(f"{url}/{name}", here / name, files[name]["sha256"])

        each([name for name in files if name not in etags], send)
        each([name for name in there if name not in files], lambda name: remove(f"{url}/{name}"))
        listed = {row.path.as_posix(): (row.size, row.etag) for row in list_objects(url)}
        expected = {name: (entry["bytes"], etags[name]) for name, entry in files.items()}
        if listed != expected:
            name = next(name for name in sorted({*listed, *expected}) if listed.get(name) != expected.get(name))
            raise RemoteError(
                f"{url}/{name}: the server lists {listed.get(name)} (bytes, ETag), expected {expected.get(name)}. Does "
                "another run make this session? Let it end, then run the same command again."
            )

    def _seal(self, folder: str, text: bytes) -> None:
        name = manifest_of(folder)
        try:
            put_bytes(f"{self.url}/{name}", text, ABSENT)
        except OutrunError:
            if self._text(name) != text:
                raise RemoteError(
                    f"{self.url}/{name}: another run has sealed another {folder} in the meantime. "
                    "Run the same command again when it has ended."
                ) from None

    def _leave(self, here: Path, text: bytes) -> None:
        """Let go of the bytes of what was sent, unless it was made again meanwhile."""
        with locked(self.build):
            if manifest_path(here).exists() and manifest_path(here).read_bytes() == text:
                write_bytes(here / AWAY, b"")
                _sweep(here)

    def _text(self, name: str) -> bytes | None:
        try:
            return fetch(f"{self.url}/{name}")[0]
        except NotThereError:
            return None  # not sent yet; every other answer is an error

    # ------------------------------------------------------------ the catalog

    def publish(self, without: str = "") -> None:
        """Derive catalog.json from what is sealed in the bucket now; runs that do so at once lose nothing."""
        for _ in range(MAX_OUTRUNS):
            found, etag = self._catalog()  # before the listing: a manifest that comes later brings its own catalog
            text = json_bytes(self._added_up(without))
            if text == found:
                return
            try:
                put_bytes(f"{self.url}/{CATALOG}", text, etag)
                return
            except OutrunError:
                time.sleep(random.uniform(0, PAUSE_S))
        raise RemoteError(f"{self.url}/{CATALOG}: {MAX_OUTRUNS} times another run wrote it first. Run it again later.")

    def _catalog(self) -> tuple[bytes | None, str]:
        try:
            return fetch(f"{self.url}/{CATALOG}")
        except NotThereError:  # an empty bucket: this run writes the first one
            return None, ABSENT

    def _added_up(self, without: str) -> dict[str, Any]:
        there = self._there()
        names = sorted(name for name in there if is_manifest(name) and folder_of(name) != without)
        texts = each(names, lambda name: self._manifest(name, there))
        found = ((text, whole(text, f"{self.url}/{name}", there)) for name, text in zip(names, texts, strict=True))
        return catalog.add_up((hashlib.sha256(text).hexdigest(), content) for text, content in found if content)

    def publish_failures(self) -> None:
        """The list of failures of this run, or none."""
        path = self.build / FAILURES
        if path.exists():
            put_bytes(f"{self.url}/{FAILURES}", path.read_bytes())
        else:
            remove(f"{self.url}/{FAILURES}")


# ---------------------------------------------------------------- names and what they seal


def is_manifest(name: str) -> bool:
    """Whether an object of the bucket is a session's or a stimulus' seal."""
    return re.fullmatch(rf"[^./][^/]*/[^./][^/]*{re.escape(MANIFEST)}", name) is not None


def manifest_of(folder: str) -> str:
    """d1/s1.zarr -> d1/s1.manifest.json."""
    return folder.removesuffix(".zarr") + MANIFEST


def folder_of(manifest: str) -> str:
    """d1/s1.manifest.json -> d1/s1.zarr."""
    return manifest.removesuffix(MANIFEST) + ".zarr"


def whole(text: bytes, where: str, there: There | None) -> dict[str, Any] | None:
    """A manifest's content, if all that it lists is there with its size; None also where it is damaged.

    `there`: None does not look. Raises ShardFormatError: what is of another version is not ours to replace.
    """
    try:
        content: dict[str, Any] = parse_json(text, where)
        folder = content["session" if "session" in content else "stimulus"]["path"]
        sizes = {f"{folder}/{name}": entry["bytes"] for name, entry in content["files"].items()}
        found = sizes if there is None else {name: there[name].size for name in sizes if name in there}
        return content if found == sizes else None
    except ShardFormatError:
        raise
    except (StoreError, KeyError, TypeError, AttributeError):  # damaged: as if it were not sealed, so it is made again
        return None


def _recordings(content: Mapping[str, Any] | None) -> set[str]:
    """Names of the input files of a session."""
    return {row["file"] for row in (content or {}).get("session", {}).get("sources", ())}


def _is_same(path: Path, entry: Mapping[str, Any] | None, there: Listed) -> bool:
    """Whether the bucket has the very bytes of a file, by the md5 that its ETag is; another ETag says nothing."""
    if entry is None or entry["bytes"] != there.size:
        return False
    with open(path, "rb") as file:
        return there.etag == f'"{hashlib.file_digest(file, "md5").hexdigest()}"'


def each(names: Sequence[str], function: Callable[[str], T]) -> list[T]:
    """The results of a function that asks the server, several at a time; the first error ends it."""
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        return list(pool.map(function, names))


def _sweep(folder: Path) -> None:
    """Remove what nobody reads here any more."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (ROOT, AWAY):
            path.unlink()


def _forget(manifest: Path) -> None:
    manifest.unlink(missing_ok=True)
    shutil.rmtree(sealed_folder(manifest), ignore_errors=True)
