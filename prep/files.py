"""Finds the NWB files that a person means by a list of files, folders and URLs, and which of them are one session.

In: sources as given, the recipe's `join`. Out: InputFile (paths, label, dataset_id), in order of path; what lies behind
a URL has the path at which it will be staged.
"""

import hashlib
import os
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from prep.disk import StoreError
from prep.remote import ask
from prep.s3 import list_objects
from prep.urls import Listed, RemoteError, is_url, shown

STAGE = ".stage"  # inside the store, where nothing else is said
LIST = "@"  # @list.txt: one source per line


@dataclass(frozen=True, order=True, kw_only=True)
class RemoteFile:
    """A file (or an NWB-Zarr folder) behind a URL, and where it is staged: its name stays what it was there."""

    url: str
    name: str
    is_folder: bool = False
    stage: Path  # all workers must see it
    is_kept: bool = False  # also when its session is sealed

    @property
    def place(self) -> Path:
        """The folder of all that is kept of this URL."""
        return self.stage / hashlib.sha256(self.url.encode()).hexdigest()[:16]

    @property
    def path(self) -> Path:
        """Where the whole file lies."""
        return self.place / "whole" / self.name

    @property
    def parts(self) -> tuple[str, ...]:
        """Server and folders."""
        return PurePosixPath(shown(self.url)).parts[:-1]


@dataclass(frozen=True, order=True)
class InputFile:
    """What becomes one session: a file (or an NWB-Zarr folder), or several that the recipe joins."""

    paths: tuple[Path, ...]  # absolute, in order
    label: str  # as seen from the folder that was given
    dataset_id: str
    remotes: tuple[RemoteFile, ...] = ()  # what must be staged before the paths are there


@dataclass(frozen=True, kw_only=True)
class Staging:
    """Where files behind URLs are staged, and whether they stay when their session is sealed."""

    folder: Path
    is_kept: bool = False


def find_files(
    sources: Sequence[str | Path],
    dataset_id: str | None,
    out: Path | None = None,
    join: str | None = None,
    staging: Staging | None = None,
) -> list[InputFile]:
    """Every file in `sources`; a folder's files are those that end in .nwb, and folders that end in .nwb.zarr.

    A source is a path, an https:// or s3:// URL, or @list.txt with one of these per line. s3://bucket/prefix is listed
    as a folder is; a folder behind https:// cannot be. Files of one folder for which the group of the regular
    expression `join`, searched in the file's name, is the same are one session. Folders below `out` are left out.
    Files behind URLs are staged in `<out>/.stage` where `staging` says nothing. Raises StoreError, RemoteError.
    """
    found: dict[tuple[bool, tuple[str, ...]], InputFile] = {}
    for source in _listed(sources):
        if isinstance(source, str) and is_url(source):
            if staging is None and out is None:
                raise StoreError(f"{source}: a URL is read where there is a store to stage it in.")
            files = _behind(source, staging or Staging(folder=(out or Path()).resolve() / STAGE), dataset_id)
        else:
            files = _below(Path(source), dataset_id, out)
        for file in files:
            found.setdefault(_order(file), file)
    ordered = [found[key] for key in sorted(found)]
    return ordered if join is None else _joined(ordered, join)


def _listed(sources: Iterable[str | Path]) -> Iterator[str | Path]:
    """The sources, with those that stand in text files."""
    for source in sources:
        if not str(source).startswith(LIST):
            yield source
            continue
        path = Path(str(source).removeprefix(LIST))
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise StoreError(f"{source}: the list cannot be read ({error}). Expected a text file.") from error
        wanted = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not wanted:
            raise StoreError(f"{source}: the list is empty. Expected one file, folder or URL per line.")
        yield from wanted


def _order(file: InputFile) -> tuple[bool, tuple[str, ...]]:
    """Local files by path, then the others by URL."""
    if not file.remotes:
        return False, file.paths[0].parts
    (remote,) = file.remotes
    return True, (*remote.parts, remote.name, remote.url)


def _below(given: Path, dataset_id: str | None, out: Path | None) -> Iterator[InputFile]:
    """A local file, or those of a local folder."""
    source = given.resolve()
    if not source.exists():
        raise StoreError(f"{given} does not exist. SRC is NWB files, folders that hold some, or URLs.")
    is_input = source.is_file() or is_nwb_folder(source.name)
    paths = [source] if is_input else list(_walk(source, out.resolve() if out else None))
    if not paths:
        raise StoreError(f"{given} holds no NWB file (*.nwb, *.nwb.zarr), nor does a folder below it.")
    folder = source.parent if is_input else source
    for path in paths:
        yield InputFile((path,), path.relative_to(folder).as_posix(), dataset_id or folder.name or "dataset")


def _joined(files: Sequence[InputFile], join: str) -> list[InputFile]:
    """Files of one folder and one group of `join` as one; each other file as it is."""
    groups: dict[tuple[tuple[str, ...], str | None, str], list[InputFile]] = {}
    for file in files:
        (path,) = file.paths
        folder = file.remotes[0].parts if file.remotes else path.parent.parts
        match = re.search(join, path.name)
        group = match.group(1) if match else None
        groups.setdefault((folder, group, path.name if group is None else ""), []).append(file)
    return [_one(members) for members in groups.values()]  # in order of their first files


def _one(members: Sequence[InputFile]) -> InputFile:
    """One input of several: a_ecephys.nwb + a_image.nwb."""
    first, *others = members
    label = " + ".join([first.label, *(path.name for other in others for path in other.paths)])
    paths = tuple(path for member in members for path in member.paths)
    return InputFile(paths, label, first.dataset_id, tuple(remote for member in members for remote in member.remotes))


def is_nwb_folder(name: str) -> bool:
    """Whether a folder of this name is an NWB-Zarr file."""
    return name.endswith((".nwb", ".nwb.zarr"))


def _walk(folder: Path, out: Path | None) -> Iterator[Path]:
    for here, folders, files in os.walk(folder):
        base = Path(here)
        yield from (base / name for name in files if name.endswith(".nwb") and not name.startswith("."))
        yield from (base / name for name in folders if is_nwb_folder(name))
        folders[:] = [n for n in folders if not n.startswith(".") and not is_nwb_folder(n) and base / n != out]


# ---------------------------------------------------------------- behind URLs


def _behind(url: str, staging: Staging, dataset_id: str | None) -> Iterator[InputFile]:
    """A file behind a URL, or those below an S3 prefix."""
    is_s3 = url.lower().startswith("s3://")
    base = url.rstrip("/") if is_s3 else url
    objects = list_objects(base) if is_s3 else []
    if not objects:
        found = [(base, _name(url), False)]
    elif is_nwb_folder(base) or {".zgroup", "zarr.json"} & {row.path.as_posix() for row in objects}:
        found = [(base, _folder_name(base), True)]
    else:
        found = [(f"{base}/{path}", path, is_folder) for path, is_folder in _recordings(objects).items()]
    if not found:
        raise StoreError(f"{url} holds no NWB file (*.nwb, *.nwb.zarr), nor does a folder below it.")
    folder = _folder(base if found[0][0] != base else shown(base).rpartition("/")[0])
    for address, label, is_folder in found:
        remote = RemoteFile(
            url=address,
            name=PurePosixPath(label).name,
            is_folder=is_folder,
            stage=staging.folder,
            is_kept=staging.is_kept,
        )
        yield InputFile((remote.path,), label, dataset_id or folder, (remote,))


def _folder(url: str) -> str:
    """The name of a folder: the last of its path, else of an S3 bucket."""
    parts = urllib.parse.urlsplit(url)
    is_s3 = parts.scheme.lower() == "s3"
    name = PurePosixPath(parts.path if is_s3 else urllib.parse.unquote(parts.path)).name
    return name or (parts.netloc if is_s3 else "") or "dataset"


def _recordings(objects: Iterable[Listed]) -> dict[str, bool]:
    """Path below the prefix of each recording, and whether it is an NWB-Zarr folder."""
    found: dict[str, bool] = {}
    for row in objects:
        parts = row.path.parts
        depth = next((n for n, part in enumerate(parts) if part.startswith(".") or is_nwb_folder(part)), None)
        if depth is not None and not parts[depth].startswith("."):
            is_folder = depth + 1 < len(parts)
            if is_folder or parts[depth].endswith(".nwb"):
                found["/".join(parts[: depth + 1])] = is_folder
    return found


def _folder_name(url: str) -> str:
    """The name of an NWB-Zarr folder that may be called anything in its bucket."""
    name = PurePosixPath(url).name
    return name if is_nwb_folder(name) else f"{name}.nwb.zarr"


def _name(url: str) -> str:
    """The file's name by its URL; where that does not say, by what the server calls it."""
    is_s3 = url.lower().startswith("s3://")
    path = url if is_s3 else urllib.parse.unquote(urllib.parse.urlsplit(url).path)
    name = path.rpartition("/")[2]
    if not is_s3 and not name.endswith(".nwb"):
        if name.endswith(".zarr"):
            raise RemoteError(f"{shown(url)}: a folder cannot be listed over https. Give an NWB-Zarr folder as s3://….")
        name = ask(url).name.replace("\\", "/").rpartition("/")[2] or name
    if not name or name.startswith(".") or not name.isprintable():
        raise RemoteError(
            f"{shown(url)} names no file, and a folder cannot be listed over https. "
            "Write one URL per line into a text file, and give SRC=@list.txt."
        )
    return name
