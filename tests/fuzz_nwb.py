"""Damages NWB files in every way that disks, networks and other people's software do, each by a number of its own.

In: a number and the seed; the sound files that `sound_files` writes. Out: a damaged file, and what was done to it. One
alone: `PYTHONPATH=tests python -m fuzz_nwb 17 --out DIR`, then `python -m prep ingest DIR/damaged --out DIR/store`.
"""

import argparse
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from fuzz_zarr import ZARR_KINDS
from layout_builders import brainwide_map, functional_fields, openscope, visual_coding
from test_prep_nwb_zarr import to_zarr, with_everything

from prep.synthetic import write_brain

Rng = np.random.Generator
SEED = 20260101
SIGNATURES = (b"TREE", b"SNOD", b"HEAP", b"GCOL", b"OHDR", b"FRHP", b"BTHD", b"OCHK")  # of HDF5's own structures
WEIGHTY = ("data", "timestamps", "spike_times", "spike_times_index", "start_time", "stop_time", "obs_intervals")
ODD_NAMES = ("../up", "..", "../../../etc/passwd", "a\nb", "ü日本", "x" * 5000, " ", "a\\b", "*", "\u202eabc", "-rf")
ODD_TEXTS = ("../../escape", "/etc/passwd", "a/b\\c", "..", "", "\n\t", "x" * 100_000, "日本", "\x07", "a.zarr", "~")


def choose(rng: Rng, items: Sequence[Any]) -> Any:
    """One of several, each as likely."""
    return items[int(rng.integers(len(items)))]


def members(file: Any, kind: type) -> list[str]:
    """Paths of all groups or datasets, but for the file's copy of the schema."""
    found: list[str] = []
    file.visititems(lambda name, item: found.append(name) if isinstance(item, kind) else None)
    return [name for name in found if not name.startswith("specifications")]


def a_dataset(rng: Rng, file: Any, names: Sequence[str] = WEIGHTY) -> str:
    """A dataset: half of the time one that a reader certainly looks at."""
    every = members(file, h5py.Dataset)
    weighty = [name for name in every if name.rsplit("/", 1)[-1] in names]
    return str(choose(rng, weighty if weighty and rng.random() < 0.7 else every))


def put(file: Any, name: str, data: Any = None, **how: Any) -> None:
    """Put another dataset in the place of one, with its attributes."""
    attributes = dict(file[name].attrs)
    del file[name]
    file.create_dataset(name, data=data, **how).attrs.update(attributes)


# ---------------------------------------------------------------- bytes


def cut_short(rng: Rng, path: Path) -> str:
    """A download that ended early."""
    size = path.stat().st_size
    keep = int(rng.integers(0, size)) if rng.random() < 0.7 else size - int(rng.integers(1, 4096))
    with open(path, "r+b") as file:
        file.truncate(keep)
    return f"cut to {keep} of {size} bytes"


def bytes_anywhere(rng: Rng, path: Path) -> str:
    """Bits that rotted."""
    content = bytearray(path.read_bytes())
    places = rng.integers(0, len(content), int(choose(rng, (1, 8, 64, 1024))))
    for place in places:
        content[place] = int(rng.integers(256))
    path.write_bytes(content)
    return f"{len(places)} bytes changed"


def bytes_of_structure(rng: Rng, path: Path) -> str:
    """Bits that rotted where HDF5 keeps its trees, heaps and headers."""
    content = bytearray(path.read_bytes())
    signature = choose(rng, [item for item in SIGNATURES if item in content])
    places = [place for place in range(len(content)) if content.startswith(signature, place)]
    begin = int(choose(rng, places))
    count = int(choose(rng, (1, 2, 8, 32)))
    for place in begin + rng.integers(0, 512, count):
        content[min(int(place), len(content) - 1)] = int(choose(rng, (0, 255, int(rng.integers(256)))))
    path.write_bytes(content)
    return f"{count} bytes changed behind {signature.decode()} at {begin}"


def block_of_zeros(rng: Rng, path: Path) -> str:
    """Sectors that were never written."""
    size = path.stat().st_size
    begin, length = int(rng.integers(size)) // 512 * 512, 512 * int(choose(rng, (1, 8, 64)))
    with open(path, "r+b") as file:
        file.seek(begin)
        file.write(bytes(min(length, size - begin)))
    return f"{length} zeros at {begin}"


# ---------------------------------------------------------------- links, names, references


def broken_link(rng: Rng, path: Path) -> str:
    """A link to nowhere, to another file, or in a circle in the place of an object."""
    with h5py.File(path, "r+") as file:
        name = choose(rng, members(file, choose(rng, (h5py.Group, h5py.Dataset))))
        parent = file[name].parent
        del file[name]
        own = name.rsplit("/", 1)[-1]
        link = choose(rng, ("soft", "external", "passwd", "circle", "self", "above"))
        links: dict[str, Any] = {
            "soft": h5py.SoftLink("/nowhere/at/all"),
            "external": h5py.ExternalLink("../../../missing.nwb", "/units"),
            "passwd": h5py.ExternalLink("/etc/passwd", "/"),
            "circle": h5py.SoftLink(f"{parent.name}/{own}_2"),
            "self": h5py.ExternalLink(path.name, "/"),
            "above": parent,
        }
        parent[own] = links[link]
        if link == "circle":
            parent[f"{own}_2"] = h5py.SoftLink(f"/{name}")
        return f"{name} is a link ({link})"


def odd_name(rng: Rng, path: Path) -> str:
    """An object by a name that is no name."""
    with h5py.File(path, "r+") as file:
        name = choose(rng, members(file, choose(rng, (h5py.Group, h5py.Dataset))))
        holder, new = file[name].parent, choose(rng, ODD_NAMES)
        encoded = new.replace("/", "\u2215") if rng.random() < 0.5 else new
        if encoded in (".", "..", ""):
            encoded += "."
        holder[encoded] = file[name]
        if rng.random() < 0.7:
            del file[name]
        return f"{name} is called {encoded[:30]!r}"


def reference_to_nowhere(rng: Rng, path: Path) -> str:
    """References that are empty, or lead to an object of another kind."""
    with h5py.File(path, "r+") as file:
        name = choose(rng, members(file, h5py.Dataset))
        wrong = h5py.Reference() if rng.random() < 0.5 else file[choose(rng, members(file, h5py.Group))].ref
        if rng.random() < 0.5:
            attribute = choose(rng, ("table", "target", "neurodata_type", "unit"))
            file[name].attrs[attribute] = wrong
            return f"{name}@{attribute} is a reference"
        put(file, name, np.full(3, wrong, dtype=h5py.ref_dtype), dtype=h5py.ref_dtype)
        return f"{name} holds references"


def missing_object(rng: Rng, path: Path) -> str:
    """An object that is gone."""
    with h5py.File(path, "r+") as file:
        kind = choose(rng, (h5py.Group, h5py.Dataset, h5py.Dataset))
        name = choose(rng, members(file, kind))
        del file[name]
    return f"{name} is gone"


# ---------------------------------------------------------------- types, sizes, attributes


def wrong_dtype(rng: Rng, path: Path) -> str:
    """Another type than the schema says."""
    choices: list[Any] = [
        np.array([b"a", b"b", b"c"]), np.array(["1.5", "x", "ü"], dtype=h5py.string_dtype()),
        np.ones(3, np.complex128), np.ones(3, bool), np.ones(3, "f2"), np.full(3, 2**63 + 5, np.uint64),
        np.zeros(3, [("x", "f4"), ("y", "i2")]), np.arange(3, dtype=">i2"), np.void(b"opaque"), h5py.Empty("f8"),
        np.array("scalar", dtype=h5py.string_dtype()), np.array([b"\xff\xfe", b"\0x", b""]),
        np.array(7), np.array([-1, -2, -3]),
    ]  # fmt: skip
    with h5py.File(path, "r+") as file:
        name, number = a_dataset(rng, file), int(rng.integers(len(choices) + 1))
        shape = file[name].shape or ()
        if number == len(choices):
            put(file, name, shape=(3,), dtype=h5py.vlen_dtype(np.int32))
            return f"{name} holds lists"
        data = choices[number]
        if isinstance(data, np.ndarray) and data.ndim and shape and rng.random() < 0.6:
            data = np.resize(data, shape)
        put(file, name, data)
        return f"{name} is {getattr(data, 'dtype', 'empty')}{getattr(data, 'shape', '')}"


def wrong_shape(rng: Rng, path: Path) -> str:
    """Fewer rows, more dimensions, none at all."""
    with h5py.File(path, "r+") as file:
        name = a_dataset(rng, file)
        data = file[name][()]
        how = choose(rng, ("none", "one", "short", "scalar", "deep", "twice"))
        if not isinstance(data, np.ndarray) or not data.ndim:
            data = np.resize(np.asarray(data), 3)
        shapes: dict[str, Callable[[], Any]] = {
            "none": lambda: data[:0], "one": lambda: data[:1], "short": lambda: data[:-1],
            "scalar": lambda: data.ravel()[0] if data.size else 0.0, "deep": lambda: data[None, ..., None],
            "twice": lambda: np.concatenate([data, data]),
        }  # fmt: skip
        put(file, name, shapes[how](), dtype=file[name].dtype)
    return f"{name}: {how}"


def absurd_size(rng: Rng, path: Path) -> str:
    """A dataset that claims more than any disk holds; nothing of it was ever written."""
    with h5py.File(path, "r+") as file:
        name = a_dataset(rng, file)
        old = file[name]
        rows, dtype = int(2 ** choose(rng, (28, 31, 40, 60))), old.dtype
        columns = (old.shape or ())[1:2] if rng.random() < 0.5 and rows < 2**50 else ()
        fill = np.nan if dtype.kind == "f" and rng.random() < 0.3 else None
        holder = f"{old.parent.name}/".lstrip("/")
        alike = [other for other in members(file, h5py.Dataset) if other.startswith(holder) and other != name
                 and file[other].shape == old.shape and "/" not in other.removeprefix(holder)]  # fmt: skip
        for other in alike if rng.random() < 0.5 else []:  # so that their lengths agree
            put(file, other, shape=(rows,), dtype=file[other].dtype, chunks=(1024,))
        put(file, name, shape=(rows, *columns), dtype=dtype, chunks=(1024, *columns), fillvalue=fill)
    return f"{name} claims {rows} rows {columns}"


def odd_attribute(rng: Rng, path: Path) -> str:
    """An attribute of another type, or gone."""
    names = ("neurodata_type", "unit", "conversion", "offset", "rate", "colnames", "namespace", "description", "table")
    values: list[Any] = [
        7, -1.5, np.nan, np.zeros(3), np.zeros((2, 2)), b"\xff\xfe", "", "../..", "x" * 30_000, h5py.Empty("f4"),
        np.array(["a", "b"], dtype=h5py.string_dtype()), np.inf, "Units", "TimeSeries", 0,
    ]  # fmt: skip
    with h5py.File(path, "r+") as file:
        holders = [name for name in members(file, object) if any(key in file[name].attrs for key in names)]
        name = choose(rng, holders)
        attribute = choose(rng, [key for key in names if key in file[name].attrs])
        del file[name].attrs[attribute]
        if rng.random() < 0.15:
            return f"{name}@{attribute} is gone"
        value = choose(rng, values)
        file[name].attrs[attribute] = value
    return f"{name}@{attribute} = {str(value)[:30]!r}"


# ---------------------------------------------------------------- values


def odd_index(rng: Rng, path: Path) -> str:
    """Index arrays that go backwards, are negative or point past the end."""
    with h5py.File(path, "r+") as file:
        every = members(file, h5py.Dataset)
        found = [name for name in every if name.endswith(("_index", "/rois")) or "region" in name]
        name = choose(rng, found or [a_dataset(rng, file)])
        size = max(1, file[name].size or 0)
        wrong = {
            "negative": -np.arange(size, dtype=np.int64) - 1, "backwards": np.arange(size, dtype=np.int64)[::-1],
            "past": np.full(size, 2**40), "huge": np.full(size, 2**63 - 1, np.uint64), "float": np.full(size, 0.5),
            "top": np.full(size, 2**64 - 1, np.uint64), "nan": np.full(size, np.nan), "zero": np.zeros(size, np.int64),
        }  # fmt: skip
        how = choose(rng, sorted(wrong))
        put(file, name, wrong[how])
    return f"{name}: {how}"


def odd_numbers(rng: Rng, path: Path) -> str:
    """NaN everywhere, infinities, times of another age."""
    with h5py.File(path, "r+") as file:
        numeric = [name for name in members(file, h5py.Dataset) if file[name].dtype.kind == "f" and file[name].size]
        weighty = [name for name in numeric if name.rsplit("/", 1)[-1] in WEIGHTY]
        chosen = numeric if rng.random() < 0.1 else [choose(rng, weighty or numeric)]
        value = choose(rng, (np.nan, np.inf, -np.inf, 1e300, -1e300, 1e15, 1e10, 5e-324, -1.0, 0.0))
        part = choose(rng, ("all", "last", "some"))
        for name in chosen:
            data = np.atleast_1d(file[name][()]).astype(np.float64)
            where = {"all": slice(None), "last": slice(-1, None), "some": slice(None, None, 7)}[part]
            data[where] = value
            put(file, name, data.reshape(file[name].shape))
    return f"{chosen[0]}{' and all others' if len(chosen) > 1 else ''}: {part} {value}"


def odd_rate(rng: Rng, path: Path) -> str:
    """Rates and starting times that no clock has."""
    with h5py.File(path, "r+") as file:
        every = [name for name in members(file, h5py.Group) if "data" in file[name]]
        name = choose(rng, every or members(file, h5py.Group))
        rate = choose(rng, (0.0, -30.0, np.nan, 1e-300, 1e300, 1e9, np.inf, 1e-9))
        start = choose(rng, (0.0, 1e300, -1e9))
        for key in ("timestamps", "starting_time"):
            if key in file[name]:
                del file[name][key]
        file[name]["starting_time"] = start
        file[name]["starting_time"].attrs.update({"rate": rate, "unit": "seconds"})
    return f"{name}: from {start} s at {rate} Hz"


def odd_id(rng: Rng, path: Path) -> str:
    """Ids with separators, ids of nothing, ids as long as a book."""
    with h5py.File(path, "r+") as file:
        names = ("general/session_id", "general/subject/subject_id", "identifier", "units/id", "nwb_version")
        name = choose(rng, names)
        text = choose(rng, ODD_TEXTS)
        if name in file:
            del file[name]
        file[name] = text
        if name == "nwb_version":
            file.attrs[name] = text
    return f"{name} = {text[:30]!r}"


HDF5_KINDS: dict[str, Callable[[Rng, Path], str]] = {
    function.__name__: function
    for function in (
        cut_short, bytes_anywhere, bytes_of_structure, block_of_zeros, broken_link, odd_name, reference_to_nowhere,
        missing_object, wrong_dtype, wrong_shape, absurd_size, odd_attribute, odd_index, odd_numbers, odd_rate, odd_id,
    )
}  # fmt: skip
KINDS = {**HDF5_KINDS, **ZARR_KINDS}
TURNS = [*HDF5_KINDS, *ZARR_KINDS, "bytes_of_structure", "absurd_size", "wrong_dtype", "odd_numbers"]


def sound_files(folder: Path) -> list[Path]:
    """Files to damage: of the synthetic brain, in the layouts of well-known collections, and Zarr folders v2 and v3."""
    folder.mkdir(parents=True)
    paths = [build(folder).path for build in (visual_coding, functional_fields, brainwide_map, openscope)]
    paths += write_brain(folder, None, "test", 0)
    for version in (2, 3):
        small = write_small(folder / f"v{version}")
        paths.append(to_zarr(small, version))
    return paths


def write_small(folder: Path) -> Path:
    """A small HDF5 file with something of everything."""
    from nwb_builders import write

    folder.mkdir()
    return write(folder, with_everything)


def damaged(number: int, sound: Sequence[Path], folder: Path, seed: int = SEED) -> tuple[Path, str]:
    """The file of a number, and what was done to it; the same for the same number and seed."""
    rng = np.random.default_rng([seed, number])
    kind = TURNS[number % len(TURNS)]
    base = choose(rng, [path for path in sound if path.is_dir() == (kind in ZARR_KINDS)])
    path = folder / f"{number:04d}_{kind}{''.join(base.suffixes[-2:]) if base.is_dir() else '.nwb'}"
    if base.is_dir():
        shutil.copytree(base, path)
    else:
        shutil.copy(base, path)
    done = KINDS[kind](rng, path)
    return path, f"{base.name}: {done}"


def main() -> None:
    """Write damaged files by their numbers, and say what they are."""
    parser = argparse.ArgumentParser(prog="python -m fuzz_nwb", description=main.__doc__)
    parser.add_argument("numbers", type=int, nargs="+", metavar="N", help="which damaged files")
    parser.add_argument("--out", type=Path, required=True, help="folder for them; it must not exist")
    args = parser.parse_args()
    sound = sound_files(args.out / "sound")
    (args.out / "damaged").mkdir()
    for number in args.numbers:
        path, done = damaged(number, sound, args.out / "damaged")
        print(f"{path}\n  {done}")


if __name__ == "__main__":
    main()
