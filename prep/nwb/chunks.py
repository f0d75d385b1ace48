"""Rows of a dataset, decoded fast where HDF5 packs them by gzip: whole chunks, by ISA-L instead of HDF5's zlib.

In: an open dataset, rows [first, stop). Out: these rows as slicing the dataset gives them.
"""

import contextlib
import itertools
import math
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from isal import igzip_lib, isal_zlib

Array = npt.NDArray[Any]
Key = tuple[Any, tuple[int, ...]]  # the dataset, and where the chunk begins

SIZES = range(2**16, 2**26)  # bytes of a chunk: HDF5 is quicker at smaller ones, and holds larger ones fewer times
KEPT_BYTES = 96 * 2**20  # in memory
PACKED_BY = ([h5py.h5z.FILTER_DEFLATE], [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE])
ITEM_BYTES = (1, 2, 4, 8)
BLOCK_WORDS = 2**16  # unshuffled at once: they stay in the cache


class _Kept(OrderedDict[Key, Array]):
    """Decoded chunks, the longest unused first; those that are too many go, to a folder of files where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = self.num_bytes = 0
        self.folder: Path | None = None
        self.spilled: dict[Key, Path] = {}
        self.read_to: dict[Key, int] = {}  # rows of a chunk that were read: who reads on wants those that follow

    def keep(self, key: Key, chunk: Array, most: int) -> None:
        """Add a chunk; `most`: that are of use."""
        self[key] = chunk
        self.num_bytes += chunk.nbytes
        while (self.num_bytes > KEPT_BYTES or len(self) > most) and len(self) > 1:
            self._drop(*self.popitem(last=False))

    def _drop(self, key: Key, chunk: Array) -> None:
        self.num_bytes -= chunk.nbytes
        if self.folder is not None and self.read_to[key] < len(chunk):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.spilled[key] = self.folder / f"chunk-{len(self.spilled)}"
            chunk.tofile(self.spilled[key])

    def forget(self) -> None:
        """Let go of all."""
        self.clear()
        for path in self.spilled.values():
            path.unlink(missing_ok=True)
        self.spilled.clear()
        self.read_to.clear()
        self.folder, self.num_bytes = None, 0


_KEPT = _Kept()


@contextlib.contextmanager
def keeping_chunks(scratch: Path | None = None) -> Iterator[None]:
    """While the block runs, chunks that are read again are not decoded again. Of one thread at a time.

    `scratch`: a folder for those that do not fit in memory; without it they are decoded again.
    """
    _KEPT.depth += 1
    _KEPT.folder = scratch or _KEPT.folder
    try:
        yield
    finally:
        _KEPT.depth -= 1
        if not _KEPT.depth:
            _KEPT.forget()


def read_rows(data: Any, first: int, stop: int) -> Array:
    """Rows [first, stop) of a dataset of at least one axis, perhaps read-only. Raises OSError where it is damaged."""
    if not _is_packed(data):
        rows: Array = data[first:stop]
        return rows
    stop = min(stop, len(data))
    corners = _corners(data, first, stop)
    if len(corners) == 1:
        return _piece(data, corners[0], first, stop)[0]
    result = np.empty((max(0, stop - first), *data.shape[1:]), data.dtype)
    for corner in corners:
        piece, place = _piece(data, corner, first, stop)
        result[place] = piece
    return result


def read_place(data: Any, place: tuple[int | slice, ...]) -> Array:
    """What slicing gives of a place (of numbers, and slices with both ends); quick where it lies inside one chunk."""
    if not _is_packed(data):
        return np.asarray(data[place])
    ends = [(part.start, part.stop) if isinstance(part, slice) else (part, part + 1) for part in place]
    corner = tuple(first // size * size for (first, _), size in zip(ends, data.chunks, strict=True))
    if any(stop > at + size for (_, stop), at, size in zip(ends, corner, data.chunks, strict=True)):
        return np.asarray(data[place])
    beyond = [max(0, at + size - length) for at, size, length in zip(corner, data.chunks, data.shape, strict=True)]
    chunk = _decoded(data, corner)[tuple(slice(size - more) for size, more in zip(data.chunks, beyond, strict=True))]
    inside = [slice(part.start - at, part.stop - at) if isinstance(part, slice) else part - at
              for part, at in zip(place, corner, strict=True)]  # fmt: skip
    return np.asarray(chunk[tuple(inside)])


def _piece(data: h5py.Dataset, corner: tuple[int, ...], first: int, stop: int) -> tuple[Array, tuple[slice, ...]]:
    """What a chunk holds of rows [first, stop), and where it stands among them."""
    ends = zip(corner, data.chunks, data.shape, strict=True)
    place = [slice(at, min(at + size, length)) for at, size, length in ends]
    inside = [slice(part.stop - part.start) for part in place]
    begin, end = max(first, corner[0]), min(stop, place[0].stop)
    place[0], inside[0] = slice(begin - first, end - first), slice(begin - corner[0], end - corner[0])
    return _part(data, corner, inside[0])[(slice(None), *inside[1:])], tuple(place)


def _is_packed(data: Any) -> bool:
    """Whether a dataset is of HDF5, in chunks of little-endian numbers, packed by gzip and nothing else."""
    if not isinstance(data, h5py.Dataset) or data.chunks is None or 0 in data.shape:
        return False
    if data.dtype.kind not in "fiu" or data.dtype.str[0] == ">" or data.dtype.itemsize not in ITEM_BYTES:
        return False
    plist = data.id.get_create_plist()
    filters = [plist.get_filter(number)[0] for number in range(plist.get_nfilters())]
    return filters in PACKED_BY and _num_bytes(data) in SIZES


def _num_bytes(data: h5py.Dataset) -> int:
    """Of one decoded chunk."""
    return int(np.prod(data.chunks, dtype=np.int64)) * int(data.dtype.itemsize)


def _num_beside(data: h5py.Dataset) -> int:
    """Chunks that hold the same rows: reading on in order of rows needs these, and those that follow."""
    sizes = zip(data.shape[1:], data.chunks[1:], strict=True)
    return math.prod(-(-length // size) for length, size in sizes)


def _num_kept(data: h5py.Dataset) -> int:
    """Chunks to hold: all, else two rows of them; where not even one row fits, most wait in files anyway: half."""
    if data.nbytes <= KEPT_BYTES:
        return sys.maxsize
    beside, size = _num_beside(data), _num_bytes(data)
    return 2 * beside if beside * size <= KEPT_BYTES else max(1, KEPT_BYTES // 2 // size)


def _corners(data: h5py.Dataset, first: int, stop: int) -> list[tuple[int, ...]]:
    """Where the chunks begin that rows [first, stop) lie in."""
    begins = [range(0, length, size) for length, size in zip(data.shape, data.chunks, strict=True)]
    size = data.chunks[0]
    return list(itertools.product(range(first // size * size, stop, size), *begins[1:])) if first < stop else []


def _part(data: h5py.Dataset, corner: tuple[int, ...], rows: slice) -> Array:
    """Rows of the decoded chunk that begins at a corner; at the dataset's border it may be wider than the dataset."""
    info = h5py.h5o.get_info(data.id)
    key = (int(info.fileno), info.addr), corner
    _KEPT.read_to[key] = rows.stop
    if key in _KEPT:
        _KEPT.move_to_end(key)
        return _KEPT[key][rows]
    if key in _KEPT.spilled:
        width = int(np.prod(data.chunks[1:], dtype=np.int64))
        place = {"offset": rows.start * width * data.dtype.itemsize, "count": (rows.stop - rows.start) * width}
        return np.fromfile(_KEPT.spilled[key], data.dtype, **place).reshape(-1, *data.chunks[1:])
    chunk = _decoded(data, corner)
    if _KEPT.depth:
        _KEPT.keep(key, chunk, _num_kept(data))
    return chunk[rows]


def _decoded(data: h5py.Dataset, corner: tuple[int, ...]) -> Array:
    if data.id.get_chunk_info_by_coord(corner).byte_offset is None:  # never written: HDF5 knows what it stands for
        return _by_hdf5(data, corner)
    skipped, packed = data.id.read_direct_chunk(corner)
    if skipped:  # a chunk may do without some of the filters
        return _by_hdf5(data, corner)
    size = _num_bytes(data)
    try:
        content = isal_zlib.decompress(packed, bufsize=size)
    except igzip_lib.IsalError as error:
        raise OSError(f"{data.name}: the chunk at {corner} is damaged ({error})") from error
    if len(content) != size:
        raise OSError(f"{data.name}: the chunk at {corner} is damaged (it has {len(content)} bytes, not {size})")
    if data.shuffle and data.dtype.itemsize > 1:
        return _unshuffled(content, data.dtype).reshape(data.chunks)
    return np.frombuffer(content, data.dtype).reshape(data.chunks)


def _by_hdf5(data: h5py.Dataset, corner: tuple[int, ...]) -> Array:
    chunk = np.zeros(data.chunks, data.dtype)
    given = data[tuple(slice(at, at + size) for at, size in zip(corner, data.chunks, strict=True))]
    chunk[tuple(slice(size) for size in given.shape)] = given
    return chunk


def _unshuffled(content: bytes, dtype: np.dtype[Any]) -> Array:
    """Numbers (n,) whose first bytes stand together, then their second bytes, and so on."""
    planes = np.frombuffer(content, np.uint8).reshape(dtype.itemsize, -1)
    words = np.empty(planes.shape[1], f"u{dtype.itemsize}")
    for start in range(0, len(words), BLOCK_WORDS):
        parts = list(planes[:, start : start + BLOCK_WORDS])
        while len(parts) > 2:
            parts = [_joined(low, high) for low, high in zip(parts[::2], parts[1::2], strict=True)]
        _joined(parts[0], parts[1], words[start : start + BLOCK_WORDS])
    words.flags.writeable = False
    return words.view(dtype)


def _joined(low: Array, high: Array, out: Array | None = None) -> Array:
    """Words of twice the size, from their lower and upper halves."""
    word = np.dtype(f"u{2 * low.itemsize}").type
    words: Array = np.left_shift(high, word(8 * low.itemsize), out=out, dtype=word, casting="unsafe")
    np.bitwise_or(words, low, out=words)
    return words
