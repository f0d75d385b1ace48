"""Finds the NWB files that a person means by a list of files and folders.

In: paths as given. Out: InputFile (path, label, dataset_id), in order of path.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prep.disk import StoreError


@dataclass(frozen=True, order=True)
class InputFile:
    """One file to ingest (or one NWB-Zarr folder)."""

    path: Path  # absolute
    label: str  # as seen from the folder that was given
    dataset_id: str


def find_files(sources: Sequence[Path], dataset_id: str | None, out: Path) -> list[InputFile]:
    """Every file in `sources`; a folder's files are those that end in .nwb, and folders that end in .nwb.zarr."""
    found: dict[Path, InputFile] = {}
    for given in sources:
        source = given.resolve()
        if not source.exists():
            raise StoreError(f"{given} does not exist. SRC is NWB files, or folders that hold some.")
        is_input = source.is_file() or _is_nwb_folder(source.name)
        paths = [source] if is_input else list(_walk(source, out.resolve()))
        if not paths:
            raise StoreError(f"{given} holds no NWB file (*.nwb, *.nwb.zarr), nor does a folder below it.")
        folder = source.parent if is_input else source
        for path in paths:
            label = path.relative_to(folder).as_posix()
            found.setdefault(path, InputFile(path, label, dataset_id or folder.name or "dataset"))
    return [found[path] for path in sorted(found)]


def _is_nwb_folder(name: str) -> bool:
    return name.endswith((".nwb", ".nwb.zarr"))


def _walk(folder: Path, out: Path) -> Iterator[Path]:
    for here, folders, files in os.walk(folder):
        base = Path(here)
        yield from (base / name for name in files if name.endswith(".nwb") and not name.startswith("."))
        yield from (base / name for name in folders if _is_nwb_folder(name))
        folders[:] = [n for n in folders if not n.startswith(".") and not _is_nwb_folder(n) and base / n != out]
