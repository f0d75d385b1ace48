"""Finds the NWB files that a person means by a list of files and folders, and which of them are one session.

In: paths as given, the recipe's `join`. Out: InputFile (paths, label, dataset_id), in order of path.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prep.disk import StoreError


@dataclass(frozen=True, order=True)
class InputFile:
    """What becomes one session: a file (or an NWB-Zarr folder), or several that the recipe joins."""

    paths: tuple[Path, ...]  # absolute, in order
    label: str  # as seen from the folder that was given
    dataset_id: str


def find_files(
    sources: Sequence[Path], dataset_id: str | None, out: Path | None = None, join: str | None = None
) -> list[InputFile]:
    """Every file in `sources`; a folder's files are those that end in .nwb, and folders that end in .nwb.zarr.

    Files of one folder for which the group of the regular expression `join`, searched in the file's name, is the same
    are one session. Folders below `out` are left out.
    """
    found: dict[Path, InputFile] = {}
    for given in sources:
        source = given.resolve()
        if not source.exists():
            raise StoreError(f"{given} does not exist. SRC is NWB files, or folders that hold some.")
        is_input = source.is_file() or is_nwb_folder(source.name)
        paths = [source] if is_input else list(_walk(source, out.resolve() if out else None))
        if not paths:
            raise StoreError(f"{given} holds no NWB file (*.nwb, *.nwb.zarr), nor does a folder below it.")
        folder = source.parent if is_input else source
        for path in paths:
            label = path.relative_to(folder).as_posix()
            found.setdefault(path, InputFile((path,), label, dataset_id or folder.name or "dataset"))
    files = [found[path] for path in sorted(found)]
    return files if join is None else _joined(files, join)


def _joined(files: Sequence[InputFile], join: str) -> list[InputFile]:
    """Files of one folder and one group of `join` as one; each other file as it is."""
    groups: dict[tuple[Path, str | None, str], list[InputFile]] = {}
    for file in files:
        (path,) = file.paths
        match = re.search(join, path.name)
        group = match.group(1) if match else None
        groups.setdefault((path.parent, group, path.name if group is None else ""), []).append(file)
    return sorted(_one(members) for members in groups.values())


def _one(members: Sequence[InputFile]) -> InputFile:
    """One input of several: a_ecephys.nwb + a_image.nwb."""
    first, *others = members
    label = " + ".join([first.label, *(path.name for other in others for path in other.paths)])
    return InputFile(tuple(path for member in members for path in member.paths), label, first.dataset_id)


def is_nwb_folder(name: str) -> bool:
    """Whether a folder of this name is an NWB-Zarr file."""
    return name.endswith((".nwb", ".nwb.zarr"))


def _walk(folder: Path, out: Path | None) -> Iterator[Path]:
    for here, folders, files in os.walk(folder):
        base = Path(here)
        yield from (base / name for name in files if name.endswith(".nwb") and not name.startswith("."))
        yield from (base / name for name in folders if is_nwb_folder(name))
        folders[:] = [n for n in folders if not n.startswith(".") and not is_nwb_folder(n) and base / n != out]
