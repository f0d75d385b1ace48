"""Damages NWB-Zarr folders: files cut, missing or changed, metadata that lies, links out of the folder.

In: a random generator, a folder to damage in place. Out: what was done, in words. tests/fuzz_nwb.py draws the numbers.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Rng = np.random.Generator
METADATA = (".zarray", ".zattrs", ".zgroup", "zarr.json", ".zmetadata")
ARRAYS = (".zarray", "zarr.json")


def choose(rng: Rng, items: Sequence[Any]) -> Any:
    """One of several, each as likely."""
    return items[int(rng.integers(len(items)))]


def _files(folder: Path, is_metadata: bool | None = None) -> list[Path]:
    every = sorted(path for path in folder.rglob("*") if path.is_file() and "specifications" not in path.parts)
    return [path for path in every if is_metadata is None or (path.name in METADATA) == is_metadata]


def zarr_bytes(rng: Rng, folder: Path) -> str:
    """A file of the folder cut short, changed or gone."""
    path = choose(rng, _files(folder, choose(rng, (True, False))))
    how, content = choose(rng, ("cut", "changed", "gone", "empty")), bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "changed" and content:
        content[int(rng.integers(len(content)))] = int(rng.integers(256))
        path.write_bytes(content)
    else:
        path.write_bytes(content[: 0 if how == "empty" else int(rng.integers(len(content) + 1))])
    return f"{path.relative_to(folder)} {how}"


def zarr_lies(rng: Rng, folder: Path) -> str:
    """Metadata of an array that cannot be so."""
    names = ("shape", "dtype", "data_type", "compressor", "filters", "codecs", "fill_value", "chunks", "chunk_grid")
    arrays = [path for path in _files(folder, True) if path.name in ARRAYS and "shape" in json.loads(path.read_text())]
    path = choose(rng, arrays)
    content = json.loads(path.read_text())
    key = choose(rng, [name for name in names if name in content])
    values: list[Any] = [None, 0, -1, [], [0], [-5], [2**40], [2**62], "|O", "<f8", "no such", {}, [[]], [2**31, 2**31]]
    content[key] = choose(rng, values)
    path.write_text(json.dumps(content))
    return f"{path.relative_to(folder)}: {key} = {content[key]!r}"


def zarr_attributes(rng: Rng, folder: Path) -> str:
    """Attributes of other types, and links and references that lead out of the folder or nowhere."""
    path = choose(rng, [path for path in _files(folder, True) if path.name in (".zattrs", "zarr.json")])
    content = json.loads(path.read_text())
    attributes = content.setdefault("attributes", {}) if path.name == "zarr.json" else content
    outside = {"source": "../../../../etc", "path": "/passwd"}
    link = [{"name": "up", "source": "..", "path": "/"}, {"name": "me", "source": ".", "path": "/"}, 7, {}]
    values: list[Any] = [7, None, [], {}, "../..", {"zarr_dtype": "object", "value": outside}, {"_REFERENCE": outside}]
    key = choose(rng, [*attributes, "zarr_link", "_LINKS", "zarr_dtype", "neurodata_type"])
    attributes[key] = link if "link" in key.lower() and rng.random() < 0.7 else choose(rng, values)
    path.write_text(json.dumps(content))
    return f"{path.relative_to(folder)}: {key} = {attributes[key]!r}"


def zarr_paths(rng: Rng, folder: Path) -> str:
    """Folders that are links in a circle, files where folders should be."""
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    path, how = choose(rng, inside), choose(rng, ("circle", "out", "file", "pipe"))
    shutil.rmtree(path)
    if how == "file":
        path.write_text("not a folder")
    elif how == "pipe":
        path.mkdir()
        os.mkfifo(path / choose(rng, (".zgroup", "zarr.json")))
    else:
        path.symlink_to(folder if how == "circle" else "/etc")
    return f"{path.name} is a {how}"


ZARR_KINDS: dict[str, Callable[[Rng, Path], str]] = {
    function.__name__: function for function in (zarr_bytes, zarr_lies, zarr_attributes, zarr_paths)
}
