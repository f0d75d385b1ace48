"""Pixels as 8-bit frames, each distinct frame stored once: films and pictures of the file, and what holds any of them.

In: datasets of frames or pictures under /stimulus. Out: planned stimuli, and for each frame where it is stored.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from prep.frames import SeenFrames, seen_frames
from prep.looks import FILMS, look
from prep.nwb.chunks import read_rows
from prep.nwb.file import dataset, holding, is_dataset
from prep.plan import PlannedStimulus, PrepError

Index = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]
BLOCK_BYTES = 32 * 2**20
WHITE_OF_BITS = (255, 1023, 4095, 16383, 65535)  # 8, 10, 12, 14, 16 bits


class FrameSource(Protocol):
    """Frames that lie somewhere: in the recording, in a picture, in a film. Picklable, holds no open file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(F, H, W[, 3])."""
        ...

    def take(self, frames: Index) -> Pixels:
        """Frames (k,), rising, as (k, H, W[, 3])."""
        ...


@dataclass(frozen=True, kw_only=True)
class Tone:
    """Which values of a dataset are black and white; what lies between is rounded to 0..255."""

    black: float = 0.0
    white: float = 255.0

    def of(self, values: npt.NDArray[Any]) -> Pixels:
        """Values of any shape as uint8."""
        if values.dtype == np.uint8:
            return np.ascontiguousarray(values, dtype=np.uint8)
        scaled = (values.astype(np.float64) - self.black) * (255.0 / (self.white - self.black))
        return np.rint(scaled).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class FileFrames:
    """A film (F, H, W[, C]) or one picture (H, W[, C]) that is a dataset of the recording."""

    path: Path
    dataset: str
    shape: tuple[int, ...]
    tone: Tone
    is_picture: bool = False

    def take(self, frames: Index) -> Pixels:
        """Frames (k,), rising, as (k, H, W[, 3])."""
        with holding((self.path, self.dataset)) as (data,):
            films = [] if self.is_picture else runs(frames)
            blocks = [read_rows(data, start, stop) for start, stop in films] or [data[()][None]]
        pixels = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        return self.tone.of(pixels[..., :3] if len(self.shape) == 4 else pixels)


def runs(frames: Index) -> Iterator[tuple[int, int]]:
    """The stretches [start, stop) without a gap that rising numbers (k,) consist of."""
    breaks = np.flatnonzero(np.diff(frames) != 1) + 1
    for part in np.split(frames, breaks):
        yield int(part[0]), int(part[-1]) + 1


def blocks_of(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Stretches [start, stop) of the first axis, each of about 32 MiB."""
    size = max(1, BLOCK_BYTES // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], size):
        yield start, min(shape[0], start + size)


# ---------------------------------------------------------------- of the recording


def film_of(path: Path, file: Any, name: str, bits: int | None = None) -> FileFrames:
    """A film that is a dataset (F, H, W[, C]). Raises PrepError with what its pixels lack."""
    data = dataset(file, name)
    shape = frame_shape(data.shape)
    tone = evident_tone(data.dtype, lambda: (data[a:b] for a, b in _blocks(data)), bits)
    return FileFrames(path=path, dataset=name, shape=shape, tone=tone)


def pictures_of(path: Path, file: Any, names: Sequence[str]) -> tuple[FileFrames, ...]:
    """Pictures (H, W[, C]), one dataset each; those of one type of number share black and white. Raises PrepError."""
    shapes = {name: frame_shape((1, *dataset(file, name).shape)) for name in names}
    alike: dict[np.dtype[Any], list[str]] = {}
    for name in names:
        alike.setdefault(file[name].dtype, []).append(name)
    tones = {kind: evident_tone(kind, _picture_values(file, same)) for kind, same in alike.items()}
    return tuple(
        FileFrames(path=path, dataset=name, shape=shapes[name], tone=tones[file[name].dtype], is_picture=True)
        for name in names
    )


def _picture_values(file: Any, names: Sequence[str]) -> Callable[[], Iterator[npt.NDArray[Any]]]:
    return lambda: (file[name][()] for name in names)


def _blocks(data: Any) -> Iterator[tuple[int, int]]:
    return blocks_of((len(data), *data.shape[1:], data.dtype.itemsize))


def frame_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """(F, H, W) or (F, H, W, 3) of a dataset; a fourth channel is opacity, which a screen does not show."""
    size = tuple(int(n) for n in shape)
    if len(size) == 4 and size[3] in (3, 4):
        size = (*size[:3], 3)
    elif len(size) != 3 and not (len(size) == 4 and size[3] == 1):
        raise PrepError(f"its pixels are {size}, expected frames x height x width, or that x 3 colours")
    if math.prod(size) == 0:
        raise PrepError(f"it has no pixels in the file: they are {size}, expected frames x height x width")
    return size


def evident_tone(
    dtype: np.dtype[Any], values: Callable[[], Iterator[npt.NDArray[Any]]], bits: int | None = None
) -> Tone:
    """Black and white, where the values themselves leave no doubt. Raises PrepError where they do.

    uint8 is as it is. Whole numbers: 0 to the white of `bits` (NWB: bits_per_pixel), else 8 bits in a wider number,
    else the white of 10, 12, 14, 16 bits where it occurs. Floats: 0..1, -1..1 (contrast), whole numbers up to 255.
    """
    if dtype == np.uint8:
        return Tone()
    if dtype.kind not in "fbiu":
        raise PrepError(f"its pixels are {dtype}, expected numbers")
    low, high, is_whole = _range(values(), dtype)
    if dtype.kind == "b":
        return Tone(white=1.0)
    if dtype.kind in "iu":
        whites = (float(2**bits - 1),) if bits else tuple(float(white) for white in WHITE_OF_BITS)
        white = high if high in whites else whites[0]
        if low >= 0 and high <= white:
            return Tone(white=white)
        raise PrepError(
            f"its pixels are {dtype} from {low:g} to {high:g}; which value is white is not in the file. "
            "Set its bits_per_pixel"
        )
    if low >= 0 and high <= 1:
        return Tone(white=1.0)
    if low >= -1 and high <= 1:
        return Tone(black=-1.0, white=1.0)
    if low >= 0 and high == 255 and is_whole:
        return Tone()
    raise PrepError(
        f"its pixels are floats from {low:g} to {high:g}; what is black and white is not in the file. "
        "Write 0 to 1, or 8-bit pixels"
    )


def _range(values: Iterator[npt.NDArray[Any]], dtype: np.dtype[Any]) -> tuple[float, float, bool]:
    low, high, is_whole = np.inf, -np.inf, True
    for block in values:
        if dtype.kind == "f" and not np.isfinite(block).all():
            raise PrepError("some of its pixels are not numbers")
        low, high = min(low, float(block.min())), max(high, float(block.max()))
        is_whole = is_whole and dtype.kind == "f" and bool((block == np.rint(block)).all())
    return low, high, is_whole


def has_pixels(data: Any) -> bool:
    """Whether a dataset holds at least one pixel."""
    return is_dataset(data) and 0 not in data.shape


# ---------------------------------------------------------------- stored once


@dataclass(frozen=True, kw_only=True)
class DistinctFrames:
    """Reads the distinct frames of several sources: a FrameReader."""

    sources: tuple[FrameSource, ...]
    source: npt.NDArray[np.int32]  # (F,) where each stored frame lies
    frame: Index  # (F,) its number there

    @property
    def is_divisible(self) -> bool:
        """Frames lie one after the other."""
        return True

    def read_once(self, edges: Sequence[int], scratch: Path) -> Iterator[Pixels]:
        """Frames [edges[i], edges[i + 1]) in turn; a chunk of a file that two of them share is decoded once."""
        with holding(*files_of(self.sources), scratch=scratch):
            for start, stop in itertools.pairwise(edges):
                yield self.read(start, stop)

    def read(self, start: int, stop: int) -> Pixels:
        """Frames [start, stop) as (stop - start, H, W[, 3])."""
        numbers, frames = self.source[start:stop], self.frame[start:stop]
        breaks = np.flatnonzero(np.diff(numbers)) + 1
        parts = zip(np.split(numbers, breaks), np.split(frames, breaks), strict=True)
        taken = [self.sources[int(number[0])].take(own) for number, own in parts]
        return taken[0] if len(taken) == 1 else np.concatenate(taken)


def files_of(sources: Sequence[FrameSource]) -> list[tuple[Path, str]]:
    """The datasets of recordings among the sources."""
    return [(source.path, source.dataset) for source in sources if isinstance(source, FileFrames)]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where the frames of several sources are stored; frames are numbered through, source by source."""

    stimuli: tuple[PlannedStimulus, ...]  # one for each size of frame, in order of first appearance
    first: Index  # (number of sources + 1,) number of the first frame of each source, and the end
    screen: npt.NDArray[np.int32]  # (N,) which stimulus each frame is in
    index: npt.NDArray[np.int32]  # (N,) its place there

    def place(self, screen: int) -> npt.NDArray[np.int32]:
        """Place (N,) of each frame in one stimulus, -1 where it has another size."""
        return np.where(self.screen == screen, self.index, -1).astype(np.int32)

    def suffix(self, screen: int) -> str:
        """What tells the streams of several sizes apart: height x width (x colours)."""
        size = "x".join(str(n) for n in self.stimuli[screen].shape[1:])
        return f"_{size}" if len(self.stimuli) > 1 else ""


@dataclass(kw_only=True)
class _Size:
    """What is known so far about the frames of one size."""

    places: dict[bytes, int] = field(default_factory=dict)  # digest of a frame: its place
    source: list[int] = field(default_factory=list)
    frame: list[int] = field(default_factory=list)
    seen: SeenFrames | None = None  # what writes them


def store_frames(sources: Sequence[FrameSource]) -> Stored:
    """Read every frame once, block by block, and plan to store the distinct ones in order of first appearance."""
    return look(FILMS, _stored, tuple(sources))


def _stored(sources: tuple[FrameSource, ...]) -> Stored:
    first = np.cumsum([0, *(source.shape[0] for source in sources)]).astype(np.int64)
    screen, index = np.zeros(first[-1], np.int32), np.zeros(first[-1], np.int32)
    sizes: dict[tuple[int, ...], _Size] = {}
    with holding(*files_of(sources)):
        _look(sources, first, screen, index, sizes)
    stimuli = tuple(_planned(sources, shape, size) for shape, size in sizes.items())
    return Stored(stimuli=stimuli, first=first, screen=screen, index=index)


def _look(
    sources: Sequence[FrameSource],
    first: Index,
    screen: npt.NDArray[np.int32],
    index: npt.NDArray[np.int32],
    sizes: dict[tuple[int, ...], _Size],
) -> None:
    """Fill in which stimulus each frame is in, and its place there; frames of the only size are written meanwhile."""
    one_size = {tuple(source.shape[1:]) for source in sources}
    seen = seen_frames(int(first[-1]), *one_size) if len(one_size) == 1 else None
    for number, source in enumerate(sources):
        size = sizes.setdefault(tuple(source.shape[1:]), _Size(seen=seen))
        screen[first[number] : first[number + 1]] = list(sizes).index(tuple(source.shape[1:]))
        for start, stop in blocks_of(source.shape):
            for frame, pixels in enumerate(source.take(np.arange(start, stop)), start):
                digest = hashlib.sha256(pixels).digest()
                if digest not in size.places:
                    size.places[digest] = len(size.places)
                    size.source.append(number)
                    size.frame.append(frame)
                    if size.seen is not None:
                        size.seen.add(pixels)
                index[first[number] + frame] = size.places[digest]


def _planned(sources: tuple[FrameSource, ...], size: tuple[int, ...], known: _Size) -> PlannedStimulus:
    """One stimulus; its digest is of its shape and of the digests of its frames."""
    shape = (len(known.places), *size)
    digest = hashlib.sha256(repr(shape).encode() + b"".join(known.places)).hexdigest()
    if known.seen is not None:
        known.seen.close(digest, len(known.places))
    used = sorted(set(known.source))
    reader = DistinctFrames(
        sources=tuple(sources[number] for number in used),
        source=np.searchsorted(used, known.source).astype(np.int32),
        frame=np.array(known.frame, np.int64),
    )
    return PlannedStimulus(digest=digest, shape=shape, reader=reader)


@dataclass(frozen=True, kw_only=True)
class HeldFrames:
    """A TokenReader of indices that travel with the plan: which stored frame was on the screen."""

    index: npt.NDArray[np.int32]  # (K,), -1 = none

    def read(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Frame of tokens [start, stop) as (stop - start, 1, 1)."""
        return self.index[start:stop].reshape(-1, 1, 1)
