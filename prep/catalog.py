"""The catalog of a token store: what is sealed in it, and what an earlier run has done already.

In: sealed manifests. Out: catalog.json, written under the store's lock, and an index of the sources that are in it.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prep.disk import StoreError, locked, read_json, sha256, write_json
from prep.frames import STIMULI
from prep.settings import FEATURE_NAMES, FEATURES_VERSION, FORMAT_VERSION
from prep.store import catalog_digest, manifest_path, sanitise

MANIFEST = ".manifest.json"
AWAY = ".away"  # in a sealed folder whose bytes are in a bucket: prep/mirror.py has seen them there
SESSION_KEYS = ("path", "dataset_id", "session_id", "sources", "recipe_digest", "features_version", "streams")
RESERVED = {STIMULI, "catalog.json", "failed.jsonl"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input file, as the store remembers it: by name and content, never by place."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Sealed:
    """One session that an earlier run has finished."""

    folder: str  # relative to the store, e.g. d1/s1.zarr
    dataset_id: str
    sources: tuple[Source, ...]
    recipe_digest: str
    versions: tuple[int, int]  # format, features
    entry: dict[str, Any]

    def is_made_with(self, dataset_id: str, recipe_digest: str) -> bool:
        """Whether the same sources would be made into the same session today."""
        made = (self.dataset_id, self.recipe_digest, self.versions)
        return made == (dataset_id, recipe_digest, (FORMAT_VERSION, FEATURES_VERSION))


def dataset_folder(dataset_id: str) -> str:
    """The folder of a dataset inside the store."""
    name = sanitise(dataset_id)
    return f"{name}_" if name in RESERVED else name


def manifests(root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every manifest of the store in order of path: of sessions and, under `stimuli/`, of stimuli."""
    for path in sorted(root.glob(f"*/*{MANIFEST}")):
        if not path.name.startswith("."):
            yield path, read_manifest(path)


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest that says what a manifest must; StoreError where it is damaged."""
    content = read_json(path)
    is_dict = isinstance(content, dict) and isinstance(content.get("files"), dict)
    keys = ("digest", "path") if is_dict and "stimulus" in content else SESSION_KEYS
    entry = content.get("stimulus", content.get("session")) if is_dict else None
    if not isinstance(entry, dict) or any(key not in entry for key in keys):
        raise StoreError(f"{path} is damaged: it is no manifest. Delete it, then run `make prep` again.")
    result: dict[str, Any] = content
    return result


def is_whole(root: Path, sealed: "Sealed") -> bool:
    """Whether all files of a session, and of the stimuli that it shows, are there with their sizes."""
    digests = {stream["stimulus"] for stream in sealed.entry["streams"]} - {None}
    folders = [root / sealed.folder, *(root / STIMULI / f"{digest}.zarr" for digest in digests)]
    return all(has_its_files(folder) for folder in folders)


def has_its_files(folder: Path) -> bool:
    """Whether a folder is sealed, and all that its manifest lists is there with its size."""
    manifest = manifest_path(folder)
    if not manifest.exists():
        return False
    if is_away(folder):
        return True
    files = read_manifest(manifest)["files"]
    return all(_has_bytes(f"{folder}/{name}", entry["bytes"]) for name, entry in files.items())


def _has_bytes(path: str, num_bytes: int) -> bool:
    """Whether a file of this size is there; strings, since stores have many files."""
    try:
        found = os.stat(path)
    except OSError:  # not there, or nobody may look
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == num_bytes


def is_away(folder: Path) -> bool:
    """Whether the bytes of a sealed folder are in a bucket, and no longer here."""
    return (folder / AWAY).exists()


def sealed_folder(manifest: Path) -> Path:
    """The folder that a manifest seals."""
    return manifest.with_name(manifest.name.removesuffix(MANIFEST) + ".zarr")


def sealed_sessions(root: Path) -> list[Sealed]:
    """What the store has already; a session whose folder is gone does not count."""
    return [
        Sealed(
            folder=content["session"]["path"],
            dataset_id=content["session"]["dataset_id"],
            sources=tuple(Source(**source) for source in content["session"]["sources"]),
            recipe_digest=content["session"]["recipe_digest"],
            versions=(content["format"], content["session"]["features_version"]),
            entry=content["session"],
        )
        for path, content in manifests(root)
        if "session" in content and sealed_folder(path).is_dir()
    ]


def build(root: Path) -> dict[str, Any]:
    """The catalog that the sealed manifests add up to."""
    return add_up((sha256(path), content) for path, content in manifests(root) if sealed_folder(path).is_dir())


def add_up(sealed: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The catalog of manifests, each with the digest of its bytes."""
    sessions: list[dict[str, Any]] = []
    stimuli: dict[str, dict[str, Any]] = {}
    for digest, content in sealed:
        seal = {"manifest_sha256": digest, "num_bytes": sum(f["bytes"] for f in content["files"].values())}
        if "session" in content:
            sessions.append({**content["session"], **seal})
        else:
            stimuli[content["stimulus"]["digest"]] = {**content["stimulus"], **seal}
    catalog = {
        "format": FORMAT_VERSION,
        "sessions": sorted(sessions, key=lambda entry: (entry["dataset_id"], entry["session_id"], entry["path"])),
        "stimuli": stimuli,
        "vocabulary": sorted({t for entry in sessions for stream in entry["streams"] for t in stream["types"]}),
        "features": {"names": list(FEATURE_NAMES), "version": FEATURES_VERSION},
    }
    return {**catalog, "sha256": catalog_digest(catalog)}


def write(root: Path) -> dict[str, Any]:
    """Derive catalog.json from what is sealed now, atomically; two ingests may do so at once."""
    with locked(root):
        catalog = build(root)
        write_json(root / "catalog.json", catalog)
    return catalog
