"""Stimulus pixels outside the recording: the recipe's asset map from a name or hash to a picture, an array, a film.

In: the recipe's `assets`, and names as the file's tables give them. Out: frame sources; errors that name the key.
"""

import fnmatch
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from prep.asset_files import NAME
from prep.nwb.pixels import FrameSource, Index, Pixels, Tone, blocks_of, evident_tone, frame_shape, runs
from prep.plan import BrokenObject, PrepError
from prep.recipe import Recipe

PICTURES = (".png", ".jpg", ".jpeg")
FILMS = (".mp4",)
ARRAYS = (".npy",)
CHROMA_STEP = 3  # levels of RGB that one step of a film's 8-bit chroma makes: what coding leaves in a grey film


@dataclass(frozen=True, kw_only=True)
class AssetFrames:
    """One asset: its frames, and for a film how many a second are shown (None: it does not say)."""

    source: FrameSource
    rate_hz: float | None


def find_asset(recipe: Recipe, name: str) -> AssetFrames | None:
    """The asset of a stimulus, by the first entry whose `match` fits its name; None where there is none.

    Raises BrokenObject, with the recipe's key, the path and the stimulus, where the asset is missing or unreadable.
    """
    for number, asset in enumerate(recipe.assets):
        if not fnmatch.fnmatchcase(name, asset.match):
            continue
        path = recipe.folder / asset.file.replace(NAME, name)
        where = f"assets[{number}].file of the recipe, for the stimulus {name!r}: {path}"
        if NAME in asset.file and not _is_below(path, recipe.folder / asset.file.split(NAME)[0]):
            raise BrokenObject(f"{where} leads out of the assets' folder. Give this stimulus an entry of its own")
        if not path.is_file():
            raise BrokenObject(f"{where} does not exist. Add the file, or narrow assets[{number}].match")
        try:
            source, rate_hz = open_asset(path)
        except PrepError as error:
            raise BrokenObject(f"{where} cannot be used: {error}") from error
        return AssetFrames(source=source, rate_hz=asset.rate_hz or rate_hz)
    return None


def _is_below(path: Path, start: Path) -> bool:
    """Whether a path stays in the folder that stands before {name}, whatever `..` the name has."""
    folder = str(start) if not start.name or start.is_dir() else str(start.parent)
    return Path(os.path.normpath(path)).is_relative_to(os.path.normpath(folder))


def open_asset(path: Path) -> tuple[FrameSource, float | None]:
    """The frames of a file, and of a film their rate in Hz. Raises PrepError."""
    suffix = path.suffix.lower()
    if suffix in PICTURES:
        return _picture(path), None
    if suffix in ARRAYS:
        return _array(path), None
    if suffix in FILMS:
        return _film(path)
    known = ", ".join((*PICTURES, *ARRAYS, *FILMS))
    raise PrepError(f"{suffix or 'a file without suffix'} is not a known kind of asset; expected one of {known}")


# ---------------------------------------------------------------- pictures


@dataclass(frozen=True, kw_only=True)
class PictureFile:
    """One picture: png or jpg, grey or RGB by its own mode."""

    path: Path
    shape: tuple[int, ...]

    def take(self, frames: Index) -> Pixels:
        """The picture as (1, H, W[, 3])."""
        return _decoded(self.path)[None]


def _picture(path: Path) -> PictureFile:
    try:
        return PictureFile(path=path, shape=(1, *_decoded(path).shape))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise PrepError(f"it is not readable as a picture ({' '.join(str(error).split())})") from error


def _decoded(path: Path) -> Pixels:
    """Pixels (H, W) or (H, W, 3); 16-bit grey is scaled, opacity is left out."""
    with Image.open(path) as image:
        if image.mode.startswith("I"):
            values = np.asarray(image)
            return evident_tone(np.dtype(np.uint16), lambda: iter([values]), bits=16).of(values)
        is_grey = image.mode in ("1", "L", "LA")
        return np.asarray(image.convert("L" if is_grey else "RGB"))


# ---------------------------------------------------------------- arrays


@dataclass(frozen=True, kw_only=True)
class ArrayFile:
    """Frames (F, H, W[, C]), or one picture (H, W[, C]), of an npy file."""

    path: Path
    shape: tuple[int, ...]
    tone: Tone

    def take(self, frames: Index) -> Pixels:
        """Frames (k,), rising, as (k, H, W[, 3])."""
        data = _as_film(np.load(self.path, mmap_mode="r"))
        taken = np.concatenate([np.asarray(data[start:stop]) for start, stop in runs(frames)])
        return self.tone.of(taken[..., :3] if len(self.shape) == 4 else taken)


def _array(path: Path) -> ArrayFile:
    try:
        data = _as_film(np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, OSError, EOFError) as error:
        raise PrepError(f"it is not readable as an array ({' '.join(str(error).split())})") from error
    shape = frame_shape(data.shape)
    size = (len(data), *data.shape[1:], data.dtype.itemsize)
    tone = evident_tone(data.dtype, lambda: (np.asarray(data[a:b]) for a, b in blocks_of(size)))
    return ArrayFile(path=path, shape=shape, tone=tone)


def _as_film(data: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A single picture becomes a film of one frame: (H, W), and (H, W, 3 or 4), which no film is so narrow as to be."""
    is_picture = data.ndim == 2 or (data.ndim == 3 and data.shape[2] in (3, 4))
    return data[None] if is_picture else data


# ---------------------------------------------------------------- films


@dataclass(frozen=True, kw_only=True)
class FilmFile:
    """A film that PyAV decodes; a frame is found again by its own time, in the film's units."""

    path: Path
    shape: tuple[int, ...]
    times: Index  # (F,) rising

    def take(self, frames: Index) -> Pixels:
        """Frames (k,), rising, as (k, H, W[, 3]): decoded from the key frame before the first to the last."""
        wanted = self.times[frames]
        taken = np.zeros((len(frames), *self.shape[1:]), np.uint8)
        number = 0
        for time, pixels in _decode(self.path, int(wanted[0])):
            if number < len(wanted) and time == wanted[number]:
                taken[number] = pixels if len(self.shape) == 4 else np.rint(pixels.mean(axis=2))
                number += 1
            if number == len(wanted):
                return taken
        raise BrokenObject(f"{self.path}: frame {int(frames[number])} is no longer there. Was the file changed?")


def _film(path: Path) -> tuple[FilmFile, float | None]:
    """Look at every frame once: their times, and whether the three colours are equal, so that it is grey."""
    times, is_grey, size = [], True, (0, 0)
    try:
        rate = _rate(path)
        for time, pixels in _decode(path, None):
            times.append(time)
            size = pixels.shape[:2]
            is_grey = is_grey and int((pixels.max(axis=2) - pixels.min(axis=2)).max()) <= CHROMA_STEP
    except (av.FFmpegError, IndexError, OSError) as error:
        raise PrepError(f"it is not readable as a film ({' '.join(str(error).split())})") from error
    if not times:
        raise PrepError("the film has no frames")
    if (np.diff(times) <= 0).any():
        raise PrepError("the film's frames are not in order of time. Encode it again")
    shape = (len(times), *size) if is_grey else (len(times), *size, 3)
    return FilmFile(path=path, shape=shape, times=np.array(times, np.int64)), None if rate is None else float(rate)


def _rate(path: Path) -> Fraction | None:
    with av.open(str(path)) as container:
        return container.streams.video[0].average_rate


def _decode(path: Path, start: int | None) -> Iterator[tuple[int, Pixels]]:
    """Time and pixels (H, W, 3) of each frame, from the key frame at or before time `start` on."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        if start is not None:
            container.seek(start, stream=stream, backward=True)
        for frame in container.decode(stream):
            if frame.pts is None:
                raise PrepError("the film's frames have no time. Encode it again")
            yield int(frame.pts), frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
