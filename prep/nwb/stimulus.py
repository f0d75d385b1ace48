"""Stimulus pixels that are in the file and have a clock: image series that were shown, index series into templates.

In: ImageSeries, OpticalSeries, IndexSeries and Images under /stimulus. Out: streams of kind `frames`, and the pixels.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.nwb.assets import find_asset
from prep.nwb.clocks import read_clock
from prep.nwb.file import as_text, dataset, follow, get, is_dataset, is_group, open_file
from prep.nwb.inventory import Draft, Node, Survey
from prep.nwb.pixels import FrameSource, Stored, film_of, has_pixels, pictures_of, store_frames
from prep.plan import PlannedStream, PrepError
from prep.settings import to_ns
from prep.store import StreamSpec

SHOWN_TYPES = ("ImageSeries", "OpticalSeries")
UNSHOWN = "a template that nothing in the file shows: no IndexSeries, and no table that names it"


@dataclass(frozen=True, kw_only=True)
class FrameIndexReader:
    """Which stored frame was on the screen, as tokens of one sample; `dataset` None: sample i shows frame i."""

    path: Path
    dataset: str | None
    rows: npt.NDArray[np.int64] | None
    num_frames: int
    place: npt.NDArray[np.int32] | None  # (num_frames,) where each frame is stored, -1 = in another stream; None: frame

    def read(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Frame of tokens [start, stop) as (stop - start, 1, 1); -1 where there is none."""
        rows = np.arange(start, stop) if self.rows is None else self.rows[start:stop]
        if self.dataset is None:
            index = rows
        else:
            begin = int(rows.min())
            with open_file(self.path) as file:
                index = file[self.dataset][begin : int(rows.max()) + 1][rows - begin].astype(np.int64)
        inside = (index >= 0) & (index < self.num_frames)
        stored = index if self.place is None else self.place[np.where(inside, index, 0)]
        return np.where(inside, stored, -1).astype(np.int32).reshape(-1, 1, 1)


def read_stimuli(survey: Survey) -> list[Draft]:
    """Plan what was shown, and the pixels, each distinct frame once."""
    drafts: list[Draft] = []
    planned: dict[str, Stored] = {}  # by path: a movie that is shown five times is digested once
    for node in list(survey.of_type("IndexSeries", *SHOWN_TYPES)):
        if not node.path.startswith("stimulus/"):
            continue  # camera images: left to the default reason
        if node.neurodata_type != "IndexSeries" and not node.path.startswith("stimulus/presentation/"):
            continue
        with survey.reading(node):
            drafts += _plan(survey, node, planned)
    for node in list(survey.of_type(*SHOWN_TYPES)):
        if node.path.startswith("stimulus/templates/"):
            survey.skip(node.path, UNSHOWN)
    return drafts


def _plan(survey: Survey, node: Node, planned: dict[str, Stored]) -> list[Draft]:
    group = survey.file[node.path]
    is_index = node.neurodata_type == "IndexSeries"
    pixels = _target(survey, group) if is_index else node
    data = dataset(group, "data") if is_index else None
    if data is not None and (data.ndim != 1 or data.dtype.kind not in "iuf" or len(data) == 0):
        raise PrepError(f"its index is {data.dtype} {data.shape}, expected one whole number per time")
    if pixels.path not in planned:
        planned[pixels.path] = store_frames(frame_sources(survey, pixels))
    stored = planned[pixels.path]
    num_frames = int(stored.first[-1])
    num_shown = num_frames if data is None else len(data)
    if num_shown < 2:
        raise PrepError("it has a single sample")
    clock, rows = read_clock(survey, node.path, num_shown)
    if data is not None:
        outside = int(((data[()] < 0) | (data[()] >= num_frames)).sum())
        if outside:
            message = f"{outside} of {num_shown} indices are beyond the {num_frames} frames; no frame was shown there"
            survey.note("frame-index", node.path, message, "repaired", num_outside=float(outside))
    base = survey.stream_name(node)
    drafts = []
    for screen in range(len(stored.stimuli)):
        place = stored.place(screen)
        is_identity = np.array_equal(place, np.arange(num_frames))
        reader = FrameIndexReader(
            path=survey.path,
            dataset=f"{node.path}/data" if is_index else None,
            rows=rows,
            num_frames=num_frames,
            place=None if is_identity else place,
        )
        spec = frames_spec(base, stored, screen, clock.sample_ns, len(clock.time_s), node.path)
        stream = PlannedStream(spec=spec, start_ns=to_ns(clock.time_s), reader=reader)
        first_s, last_s = float(clock.time_s[0]), float(clock.time_s[-1])
        stimuli = (stored.stimuli[screen],)
        drafts.append(Draft(stream=stream, first_s=first_s, last_s=last_s, time_s=clock.time_s, stimuli=stimuli))
    names = ", ".join(draft.stream.spec.name for draft in drafts)
    survey.use(node.path, names)
    if is_index:
        use_pixels(survey, pixels, names)
    return drafts


def frames_spec(base: str, stored: Stored, screen: int, sample_ns: int, num_tokens: int, origin: str) -> StreamSpec:
    """Schema of a stream of kind `frames`; of several sizes of frame each has its own stream, named by the size."""
    return StreamSpec(
        name=base + stored.suffix(screen),
        kind="frames",
        modality="stimulus",
        num_tokens=num_tokens,
        num_sources=1,
        samples_per_token=1,
        duration_ns=sample_ns,
        sample_ns=sample_ns,
        channels=("screen",),
        unit="frame",
        origin=origin,
        stimulus=stored.stimuli[screen].digest,
    )


def use_pixels(survey: Survey, pixels: Node, name: str) -> None:
    """Account for a template and what is in it: its pixels became those of a stream."""
    _use_also(survey, pixels.path, name, "pixels")
    for child in survey.nodes.values():
        if child.parent == pixels.path:
            _use_also(survey, child.path, name, "pixels" if child.name != "order_of_images" else "order of the frames")


def _use_also(survey: Survey, path: str, name: str, reason: str) -> None:
    """Account for an object that several streams may share."""
    before = survey.found.get(path, (None, ""))[0]
    survey.use(path, name if before is None or name in before.split(", ") else f"{before}, {name}", reason)


def _target(survey: Survey, group: Any) -> Node:
    """What an IndexSeries points into."""
    for link in ("indexed_timeseries", "indexed_images"):
        target = get(group, link)
        if is_group(target):
            path = survey.path_of(target)
            if path in survey.nodes:
                return survey.nodes[path]
    raise PrepError("it points to no image series or images in this file")


# ---------------------------------------------------------------- pixels


def frame_sources(survey: Survey, node: Node) -> tuple[FrameSource, ...]:
    """The frames of an image series (one source), or of Images in their order (one each). Raises PrepError."""
    if node.neurodata_type == "Images":
        return pictures_of(survey.path, survey.file, _ordered(survey, node))
    group = survey.file[node.path]
    external = get(group, "external_file")
    if external is not None and not has_pixels(get(group, "data")):
        return (_external(survey, node, [as_text(name) for name in np.atleast_1d(external[()])]),)
    bits = get(group, "bits_per_pixel")
    return (film_of(survey.path, survey.file, f"{node.path}/data", int(bits[()]) if is_dataset(bits) else None),)


def _external(survey: Survey, node: Node, files: list[str]) -> FrameSource:
    """Frames outside the recording, where the recipe's `assets` names the series or its file."""
    for name in (node.name, *(os.path.basename(file) for file in files if len(files) == 1)):
        asset = find_asset(survey.recipe, name)
        if asset is not None:
            return asset.source
    raise PrepError(f"its pixels are in another file ({', '.join(files)}). Name that file under `assets` of the recipe")


def _ordered(survey: Survey, node: Node) -> tuple[str, ...]:
    """Paths of the pictures of an Images container in the order that its index counts."""
    order = get(survey.file, f"{node.path}/order_of_images")
    if order is None:
        raise PrepError("its Images have no order, so an index says nothing")
    pictures = [follow(survey.file, reference) for reference in order[()]]
    if not pictures:
        raise PrepError("its Images container is empty")
    if any(picture is None for picture in pictures):
        raise PrepError("its order_of_images points to pictures that are not in the file")
    return tuple(survey.path_of(picture) for picture in pictures)
