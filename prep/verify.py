"""Checks every byte of a token store, and that zarr-python reads in it what we read.

In: a store. Out: a table of sessions and stimuli, each problem with its file; exit code 1 where there is any.
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prep import catalog
from prep.disk import StoreError, json_bytes, read_json, sha256
from prep.mirror import each, folder_of, is_manifest
from prep.remote import download
from prep.s3 import list_objects
from prep.shards import Array, Rows, read_array, read_with_zarr, rows_spec, sidecar_digests
from prep.store import CATALOG, FAILURES
from prep.text_table import table_lines
from prep.urls import scheme_of, shown

KNOWN = {CATALOG, FAILURES}


@dataclass
class Checked:
    """One sealed folder, and what is wrong with it."""

    folder: str
    num_files: int = 0
    num_bytes: int = 0
    num_arrays: int = 0
    problems: list[str] = field(default_factory=list)


def verify(root: Path) -> list[Checked]:
    """Check a store; the first entry is about the store itself."""
    if not root.is_dir():
        raise StoreError(f"{root} is not a folder. Give the folder of a token store, as in `make verify STORE=…`.")
    top = Checked("catalog.json")
    manifests = sorted(path for path in root.glob(f"*/*{catalog.MANIFEST}") if not path.name.startswith("."))
    if not manifests and not (root / "catalog.json").exists():
        raise StoreError(f"{root} is no token store: it has neither a catalog.json nor a manifest. Check the path.")
    results = [check_folder(root, path) for path in manifests]
    _check_catalog(root, top)
    _check_extra(root, set(manifests), top)
    return [top, *results]


def verify_bucket(url: str) -> list[Checked]:
    """Check a store at s3://: each session in turn is brought to this disk, checked as any, and removed again."""
    there = [row.path.as_posix() for row in list_objects(url)]
    manifests = sorted(name for name in there if is_manifest(name))
    if not manifests and CATALOG not in there:
        raise StoreError(f"{url} is no token store: it has neither a catalog.json nor a manifest. Check the URL.")
    with tempfile.TemporaryDirectory() as place:
        root, results = Path(place), []
        each([name for name in (*manifests, CATALOG) if name in there], lambda name: _bring(url, name, root))
        for manifest in manifests:
            folder = folder_of(manifest)
            each([name for name in there if name.startswith(f"{folder}/")], lambda name: _bring(url, name, root))
            results.append(check_folder(root, root / manifest))
            shutil.rmtree(root / folder, ignore_errors=True)
            (root / folder).mkdir()  # it counts for the catalog
        top = Checked(CATALOG)
        _check_catalog(root, top)
    sealed = tuple(f"{folder_of(name)}/" for name in manifests)
    strays = (name for name in there if name not in {*KNOWN, *manifests} and not name.startswith((".", *sealed)))
    top.problems += [f"{name}: not sealed by a manifest; run the same `make prep` again" for name in strays]
    return [top, *results]


def _bring(url: str, name: str, root: Path) -> None:
    path = root / name
    if ".." in path.parts:
        raise StoreError(f"{url}: the object {name!r} would leave its folder. Remove it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    download(f"{url}/{name}", path)


def _check_catalog(root: Path, top: Checked) -> None:
    path = root / "catalog.json"
    try:
        found = read_json(path)
        expected = catalog.build(root)
    except (StoreError, KeyError, TypeError, AttributeError) as error:
        top.problems.append(f"catalog.json: {error}")
        return
    top.num_files, top.num_bytes = 1, path.stat().st_size
    if found == expected and path.read_bytes() != json_bytes(expected):
        top.problems.append("catalog.json: damaged (its bytes are not what its content is written as)")
    if found == expected:
        return
    top.problems.append("catalog.json: differs from what the manifests add up to")
    for kind, key in (("sessions", "path"), ("stimuli", "path")):
        ours, theirs = _by_key(expected.get(kind), key), _by_key(found.get(kind), key)
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                manifest = f"{name.removesuffix('.zarr')}{catalog.MANIFEST}"
                top.problems.append(f"catalog.json: its entry of {name} differs from {manifest}, or one is missing")


def _by_key(entries: Any, key: str) -> dict[str, Any]:
    rows = entries.values() if isinstance(entries, dict) else entries
    return {str(row.get(key)): row for row in rows or [] if isinstance(row, dict)}


def _check_extra(root: Path, manifests: set[Path], top: Checked) -> None:
    """Files that no manifest knows; hidden names belong to runs (locks, leftovers) and are never read."""
    sealed = {catalog.sealed_folder(path) for path in manifests}
    for path in sorted(root.iterdir()):
        if path.name.startswith(".") or path.name in KNOWN:
            continue
        if not path.is_dir():
            top.problems.append(f"{path.name}: is no part of a store")
            continue
        for inner in sorted(path.iterdir()):
            if not inner.name.startswith(".") and inner not in sealed and inner not in manifests:
                top.problems.append(
                    f"{path.name}/{inner.name}: not sealed by a manifest; run the same `make prep` again"
                )


def check_folder(root: Path, manifest: Path) -> Checked:
    """Check one session or stimulus against its manifest."""
    folder = catalog.sealed_folder(manifest)
    result = Checked(folder.relative_to(root).as_posix())
    name = manifest.relative_to(root).as_posix()
    try:
        content = read_json(manifest)
        files = content["files"]
        if manifest.read_bytes() != json_bytes(content):
            result.problems.append(f"{name}: damaged (its bytes are not what its content is written as)")
        result.problems += [f"{result.folder}/{problem}" for problem in _check_files(folder, files, result)]
    except (StoreError, KeyError, TypeError, AttributeError) as error:
        result.problems.append(f"{name}: {error}")
        return result
    if not result.problems:  # damaged bytes are named already; what they decode to is no matter
        for path in sorted(folder.rglob("zarr.json")):
            result.problems += [f"{result.folder}/{problem}" for problem in _check_array(folder, path.parent, files)]
            result.num_arrays += read_json(path)["node_type"] == "array"
    return result


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]], result: Checked) -> Iterator[str]:
    present = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    for name in sorted(present.keys() | files.keys()):
        if name not in present:
            yield f"{name}: missing"
        elif name not in files:
            yield f"{name}: not in the manifest"
        elif present[name].stat().st_size != files[name]["bytes"]:
            yield f"{name}: {present[name].stat().st_size} bytes, the manifest says {files[name]['bytes']}"
        elif sha256(present[name]) != files[name]["sha256"]:
            yield f"{name}: damaged (sha256 differs from the manifest)"
        else:
            result.num_files += 1
            result.num_bytes += files[name]["bytes"]


def _check_array(folder: Path, path: Path, files: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A sample of an array (small ones whole) by zarr-python and by our reader."""
    if read_json(path / "zarr.json")["node_type"] != "array":
        return
    name = path.relative_to(folder).as_posix()
    try:
        for start, stop, ours in _samples(path, sidecar_digests(files, name)):
            theirs = read_with_zarr(path, start, stop)
            if ours.dtype.newbyteorder("=") != theirs.dtype or not np.array_equal(ours, theirs, ours.dtype.kind == "f"):
                yield f"{name}: rows [{start}, {stop}) read differently by zarr-python"
    except Exception as error:  # whatever a reader makes of a broken file, it is this file's problem
        yield f"{name}: {type(error).__name__}: {error}"


def _samples(path: Path, sidecars: Mapping[int, str]) -> Iterator[tuple[int, int, Array]]:
    codecs = read_json(path / "zarr.json")["codecs"]
    if codecs[0]["name"] != "sharding_indexed":
        array = read_array(path)
        yield 0, len(array), array
        return
    spec = rows_spec(path)
    rows, total, step = Rows(path, spec, sidecars), spec.shape[0], spec.chunk_rows
    middle = total // 2 // step * step
    for start in sorted({0, middle, max(0, total - step)}):  # a first, a middle, a last stretch that may cross chunks
        yield start, min(start + step, total), rows.read(start, min(start + step, total))


def print_results(results: list[Checked]) -> None:
    """One row per sealed folder, then the problems by file."""
    rows = [
        (
            row.folder,
            str(row.num_files),
            f"{row.num_bytes / 1e6:.2f}",
            str(row.num_arrays),
            f"{len(row.problems)} problems" if row.problems else "ok",
        )
        for row in results
    ]
    header = ("what", "files", "MB", "arrays", "result")
    print("\n".join([*table_lines(header, rows, right=header[1:4]), *(p for row in results for p in row.problems)]))


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m prep verify`."""
    parser.add_argument("store", metavar="STORE", help="the token store to check: a folder, s3://…")


def main(args: argparse.Namespace) -> int:
    """Exit code: 0 all is as written, 1 something differs (named)."""
    scheme = scheme_of(args.store)
    if scheme not in ("", "s3"):
        raise StoreError(f"{shown(args.store)}: {scheme}:// cannot be listed. Verify the store where it was made.")
    results = verify_bucket(args.store.rstrip("/")) if scheme else verify(Path(args.store))
    print_results(results)
    num_problems = sum(len(row.problems) for row in results)
    if num_problems:
        print(f"{args.store}: {num_problems} problems. To mend: delete the .manifest.json of what is damaged, then run")
        print("the same `make prep` again; it writes that session anew, and the catalog.")
    else:
        print(f"{args.store}: all is as it was written.")
    return 1 if num_problems else 0
