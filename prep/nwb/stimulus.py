"""Stimulus pixels that are in the file: image series that were shown, and index series into templates.

In: ImageSeries, IndexSeries and Images under /stimulus. Out: streams of kind `frames`, and the pixels they point into.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from prep.nwb.inventory import Draft, Node, Survey, as_text, dataset, get, open_file
from prep.nwb.traces import read_clock
from prep.plan import PlannedStimulus, PlannedStream, PrepError
from prep.settings import to_ns
from prep.store import StreamSpec

BLOCK_BYTES = 32 * 2**20
SHOWN_TYPES = ("ImageSeries", "OpticalSeries")


@dataclass(frozen=True, kw_only=True)
class PixelReader:
    """Reads frames as uint8; `datasets` is one movie (F, H, W[, C]), or one picture (H, W[, C]) per frame."""

    path: Path
    datasets: tuple[str, ...]
    is_movie: bool
    scale: float  # what a value of the file is multiplied with to become 0..255

    def read(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Frames [start, stop) as (stop - start, H, W[, C])."""
        with open_file(self.path) as file:
            if self.is_movie:
                pixels = file[self.datasets[0]][start:stop]
            else:
                pixels = np.stack([file[name][()] for name in self.datasets[start:stop]])
        if self.scale == 1:
            return np.ascontiguousarray(pixels, dtype=np.uint8)
        scaled: npt.NDArray[np.uint8] = np.rint(pixels.astype(np.float64) * self.scale).astype(np.uint8)
        return scaled


@dataclass(frozen=True, kw_only=True)
class FrameIndexReader:
    """Which frame was on the screen, as tokens of one sample; `dataset` None: sample i shows frame i."""

    path: Path
    dataset: str | None
    rows: npt.NDArray[np.int64] | None
    num_frames: int

    def read(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Frame of tokens [start, stop) as (stop - start, 1, 1); -1 where there is none."""
        rows = np.arange(start, stop) if self.rows is None else self.rows[start:stop]
        if self.dataset is None:
            index = rows
        else:
            begin = int(rows.min())
            with open_file(self.path) as file:
                index = file[self.dataset][begin : int(rows.max()) + 1][rows - begin].astype(np.int64)
        index = np.where((index >= 0) & (index < self.num_frames), index, -1)
        return index.astype(np.int32).reshape(-1, 1, 1)


def read_stimuli(survey: Survey) -> tuple[list[Draft], tuple[PlannedStimulus, ...]]:
    """Plan what was shown, and the pixels, each once."""
    drafts: list[Draft] = []
    stimuli: dict[str, PlannedStimulus] = {}
    planned: dict[str, PlannedStimulus] = {}  # by path: a movie that is shown five times is digested once
    for node in list(survey.of_type("IndexSeries", *SHOWN_TYPES)):
        if not node.path.startswith("stimulus/"):
            continue  # camera images: left to the default reason
        if node.neurodata_type != "IndexSeries" and not node.path.startswith("stimulus/presentation/"):
            continue
        try:
            draft, stimulus = _plan(survey, node, planned)
        except PrepError as error:
            survey.skip(node.path, str(error))
            continue
        stimuli[stimulus.digest] = stimulus
        drafts.append(draft)
    for node in list(survey.of_type(*SHOWN_TYPES)):
        if node.path.startswith("stimulus/templates/"):
            survey.skip(node.path, "a template that no IndexSeries shows: when it was shown is not in the file")
    return drafts, tuple(stimuli.values())


def _plan(survey: Survey, node: Node, planned: dict[str, PlannedStimulus]) -> tuple[Draft, PlannedStimulus]:
    group = survey.file[node.path]
    is_index = node.neurodata_type == "IndexSeries"
    pixels = _target(survey, group) if is_index else node
    data = dataset(group, "data") if is_index else None
    if data is not None and (data.ndim != 1 or data.dtype.kind not in "iuf" or len(data) == 0):
        raise PrepError(f"its index is {data.dtype} {data.shape}, expected one whole number per time")
    if pixels.path not in planned:
        planned[pixels.path] = plan_pixels(survey, pixels)
    stimulus = planned[pixels.path]
    num_frames = stimulus.shape[0]
    num_shown = num_frames if data is None else len(data)
    if num_shown < 2:
        raise PrepError("it has a single sample")
    clock, rows = read_clock(survey, node.path, num_shown)
    if data is not None:
        outside = int(((data[()] < 0) | (data[()] >= num_frames)).sum())
        if outside:
            message = f"{outside} of {num_shown} indices are beyond the {num_frames} frames; no frame was shown there"
            survey.note("frame-index", node.path, message, "repaired")
    name = survey.stream_name(node)
    spec = StreamSpec(
        name=name,
        kind="frames",
        modality="stimulus",
        num_tokens=len(clock.time_s),
        num_sources=1,
        samples_per_token=1,
        duration_ns=clock.sample_ns,
        sample_ns=clock.sample_ns,
        channels=("screen",),
        unit="frame",
        origin=node.path,
        stimulus=stimulus.digest,
    )
    reader = FrameIndexReader(
        path=survey.path, dataset=f"{node.path}/data" if is_index else None, rows=rows, num_frames=num_frames
    )
    survey.use(node.path, name)
    if is_index:
        _use_target(survey, pixels, name)
    stream = PlannedStream(spec=spec, start_ns=to_ns(clock.time_s), reader=reader)
    return Draft(stream=stream, first_s=float(clock.time_s[0]), last_s=float(clock.time_s[-1])), stimulus


def _use_target(survey: Survey, pixels: Node, name: str) -> None:
    survey.use(pixels.path, name, "pixels")
    for child in survey.nodes.values():
        if child.parent == pixels.path:
            survey.use(child.path, name, "pixels" if child.name != "order_of_images" else "order of the frames")


def _target(survey: Survey, group: Any) -> Node:
    """What an IndexSeries points into."""
    for link in ("indexed_timeseries", "indexed_images"):
        target = get(group, link)
        if isinstance(target, h5py.Group):
            path = survey.path_of(target)
            if path in survey.nodes:
                return survey.nodes[path]
    raise PrepError("it points to no image series or images in this file")


# ---------------------------------------------------------------- pixels


def plan_pixels(survey: Survey, node: Node) -> PlannedStimulus:
    """Plan the pixels of an ImageSeries or an Images container. Raises PrepError (the reason to skip it)."""
    group = survey.file[node.path]
    is_movie = node.neurodata_type != "Images"
    names = (f"{node.path}/data",) if is_movie else _pictures(survey, node)
    if is_movie and get(group, "external_file") is not None and 0 in _shape(get(group, "data")):
        raise PrepError(f"its pixels are in another file ({as_text(group['external_file'][()])})")
    first = dataset(survey.file, names[0])
    shape = first.shape if is_movie else (len(names), *first.shape)
    is_grey_or_rgb = len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))
    if not is_grey_or_rgb or math.prod(shape) == 0:
        raise PrepError(f"its pixels are {shape}, expected frames x height x width, or that x 3 colours")
    if not is_movie and any(survey.file[name].shape != first.shape for name in names):
        raise PrepError("its pictures differ in size")
    reader = PixelReader(path=survey.path, datasets=names, is_movie=is_movie, scale=_scale(survey, names))
    digest = hashlib.sha256(repr(tuple(int(n) for n in shape)).encode())
    for start, stop in _blocks(shape):
        digest.update(reader.read(start, stop).tobytes())
    return PlannedStimulus(digest=digest.hexdigest(), shape=tuple(int(n) for n in shape), reader=reader)


def _shape(data: Any) -> tuple[int, ...]:
    return tuple(data.shape) if isinstance(data, h5py.Dataset) else (0,)


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    size = max(1, BLOCK_BYTES // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], size):
        yield start, min(shape[0], start + size)


def _pictures(survey: Survey, node: Node) -> tuple[str, ...]:
    """Paths of the pictures of an Images container in the order that its index counts."""
    order = get(survey.file, f"{node.path}/order_of_images")
    if order is None:
        raise PrepError("its Images have no order, so an index says nothing")
    paths = tuple(survey.path_of(survey.file[reference]) for reference in order[()])
    if not paths:
        raise PrepError("its Images container is empty")
    return paths


def _scale(survey: Survey, names: tuple[str, ...]) -> float:
    """What makes the file's values 0..255: 1 for uint8, 255 for floats within [0, 1] and for booleans."""
    scale = 1.0
    for name in names:
        data = survey.file[name]
        if data.dtype == np.uint8:
            continue
        if data.dtype.kind not in "fb":
            raise PrepError(f"its pixels are {data.dtype}; only uint8, and floats from 0 to 1, are read")
        for start, stop in _blocks((len(data), *data.shape[1:], data.dtype.itemsize)):
            block = data[start:stop]
            if not (np.isfinite(block).all() and block.min() >= 0 and block.max() <= 1):
                raise PrepError("its pixels are floats beyond 0 to 1; what is black and white is not in the file")
        scale = 255.0
    if scale != 1 and any(survey.file[name].dtype == np.uint8 for name in names):
        raise PrepError("its pictures differ in the type of their pixels")
    return scale
