"""Pixels that a table names: which frame was on the screen from when to when, by names of templates, pictures, assets.

In: rows of a stimulus table, templates of the file, the recipe's assets. Out: streams of kind `frames`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.nwb.assets import FILMS, PICTURES, find_asset
from prep.nwb.file import follow, get, is_dataset, is_group
from prep.nwb.inventory import Draft, Node, Survey
from prep.nwb.pixels import FrameSource, HeldFrames, Stored, pictures_of, store_frames
from prep.nwb.stimulus import SHOWN_TYPES, UNSHOWN, frame_sources, frames_spec, use_pixels
from prep.plan import PlannedStream, PrepError
from prep.settings import to_ns

Floats = npt.NDArray[np.float64]
REFRESH_S = 1 / 60  # of a usual screen: how exact a table's times are, at best
SUFFIXES = (*PICTURES, *FILMS, ".npy", ".tif", ".tiff", ".bmp")
TEMPLATE_ENDINGS = ("_image_stack", "_template", "_movie", "_stack")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a table says was shown: n rows in order of time."""

    path: str  # of the table
    start_s: Floats  # (n,)
    stop_s: Floats  # (n,) NaN = not given
    frame: Floats  # (n,) NaN = not given
    names: Sequence[tuple[str, ...]]  # n; () = nothing was shown


@dataclass(frozen=True, kw_only=True)
class Screenplay:
    """One film or set of pictures by name: its frames, numbered through."""

    key: str
    sources: tuple[FrameSource, ...]
    rate_hz: float | None
    is_film: bool  # its frames follow each other in time
    node: Node | None  # None: outside of the file

    @property
    def num_frames(self) -> int:
        """Frames of all its sources."""
        return sum(source.shape[0] for source in self.sources)


Found = tuple[Screenplay, int | None]  # and the frame, where the name is that of a single picture


@dataclass(kw_only=True)
class Library:
    """What names can mean in one file; looked up once each."""

    survey: Survey
    nodes: dict[str, Node] = field(default_factory=dict)  # by plain name: templates and presented series
    pictures: dict[str, Node] = field(default_factory=dict)  # by plain name: pictures in Images
    opened: dict[str, Screenplay] = field(default_factory=dict)
    looked_up: dict[str, Found | None] = field(default_factory=dict)
    orders: dict[str, dict[str, int]] = field(default_factory=dict)  # container of pictures: place of each, by path

    def find(self, names: tuple[str, ...]) -> Found | None:
        """The pixels of a row by its names, the most special first; None where there are none. Raises PrepError."""
        for name in names:
            if name not in self.looked_up:
                self.looked_up[name] = self._in_file(plain(name)) or self._outside(name)
            found = self.looked_up[name]
            if found is not None:
                return found
        return None

    def _in_file(self, name: str) -> Found | None:
        choices = (name, *(f"{name}{ending}" for ending in TEMPLATE_ENDINGS))
        node = next((self.nodes[choice] for choice in choices if choice in self.nodes), None)
        if node is not None:
            return self._open(node), None
        picture = self.pictures.get(name)
        if picture is None:
            return None
        container = self.survey.nodes[picture.parent]
        if container.path not in self.orders:
            paths = _pictures(self.survey, container)
            self.orders[container.path] = {path: place for place, path in reversed(list(enumerate(paths)))}
        return self._open(container), self.orders[container.path][picture.path]

    def _open(self, node: Node) -> Screenplay:
        if node.path not in self.opened:
            is_film = node.neurodata_type != "Images"
            survey = self.survey
            names = _pictures(survey, node)
            sources = frame_sources(survey, node) if is_film else pictures_of(survey.path, survey.file, names)
            rate_hz = _rate_hz(survey.file[node.path]) if is_film else None
            is_film = is_film and sum(source.shape[0] for source in sources) > 1
            self.opened[node.path] = Screenplay(
                key=node.path, sources=sources, rate_hz=rate_hz, is_film=is_film, node=node
            )
        return self.opened[node.path]

    def _outside(self, name: str) -> Found | None:
        asset = find_asset(self.survey.recipe, name)
        if asset is None:
            return None
        source, key = asset.source, f"/assets/{name}"
        is_film = source.shape[0] > 1
        return Screenplay(key=key, sources=(source,), rate_hz=asset.rate_hz, is_film=is_film, node=None), None


def plain(name: str) -> str:
    """A name as it is compared: without folder and suffix of a file, in lower case."""
    path = PurePosixPath(name.strip().lower())
    return path.stem if path.suffix in SUFFIXES else path.name


def library(survey: Survey) -> Library:
    """Everything under /stimulus that a table's rows can name, in order of path: of two of one name the first."""
    result = Library(survey=survey)
    for node in survey.nodes.values():
        used_as, reason = survey.found.get(node.path, (None, ""))
        is_free = node.path not in survey.found or used_as is not None or reason == UNSHOWN
        if not node.path.startswith("stimulus/") or not is_free:
            continue
        if node.neurodata_type in (*SHOWN_TYPES, "Images"):
            result.nodes.setdefault(plain(node.name), node)
        elif survey.nodes[node.parent].neurodata_type == "Images" and node.name != "order_of_images":
            result.pictures.setdefault(plain(node.name), node)
    return result


def _pictures(survey: Survey, node: Node) -> list[str]:
    """Paths of the pictures of an Images container: in its own order, else in order of name."""
    inside = [other for other in survey.nodes.values() if other.parent == node.path]
    paths = [other.path for other in inside if other.name != "order_of_images"]
    order = get(survey.file, f"{node.path}/order_of_images")
    if order is None:
        return paths
    targets = [follow(survey.file, reference) for reference in order[()]]
    ordered = [survey.path_of(target) for target in targets if target is not None]
    return [*ordered, *(path for path in paths if path not in set(ordered))]


def _rate_hz(group: Any) -> float | None:
    """Frames a second of an image series, None where it does not say."""
    start = get(group, "starting_time")
    if is_dataset(start):
        rate = float(start.attrs.get("rate", np.nan))
        return rate if np.isfinite(rate) and rate > 0 else None
    stamps = get(group, "timestamps")
    steps = np.diff(stamps[()].astype(np.float64)) if is_dataset(stamps) else np.zeros(0)
    steps = steps[np.isfinite(steps) & (steps > 0)]
    return 1 / float(np.median(steps)) if len(steps) else None


# ---------------------------------------------------------------- rows to tokens


@dataclass(kw_only=True)
class _Tape:
    """Tokens as they are written: a time, a film, a frame of it; film -1 = nothing known is on the screen."""

    start_s: list[float] = field(default_factory=list)
    film: list[int] = field(default_factory=list)
    frame: list[int] = field(default_factory=list)

    def show(self, start_s: float, film: int, frame: int) -> None:
        """One more token."""
        self.start_s.append(start_s)
        self.film.append(film)
        self.frame.append(frame)

    def clear(self, start_s: float) -> None:
        """The screen no longer shows what it did; before the first frame there is nothing to say."""
        if self.film and self.film[-1] != -1:
            self.show(start_s, -1, 0)


def read_frames(survey: Survey, rows: Rows, names: Library, base: str) -> list[Draft]:
    """Plan the streams of frames that a table's rows show, one for each size of frame; [] where no pixels are found.

    A row starts the frame that it names, or plays a film from its first frame on. At its stop there is no frame (-1)
    unless the next row follows at once: within half a frame, and 1.5 refreshes of a screen. Raises PrepError.
    """
    found = [names.find(row) for row in rows.names]
    found = [None if item is None or _is_clocked(survey, item[0], at) else item
             for item, at in zip(found, rows.start_s, strict=True)]  # fmt: skip
    films = sorted({item[0].key: item[0] for item in found if item is not None}.values(), key=lambda film: film.key)
    if not films:
        return []
    frames = _frames(survey, rows, found, films)
    tape = _play(rows, found, films, frames)
    if not tape.start_s:
        return []
    stored = store_frames([source for film in films for source in film.sources])
    first = np.cumsum([0, *(film.num_frames for film in films)])
    film, frame = np.array(tape.film), np.array(tape.frame)
    number = np.where(film >= 0, first[film] + frame, -1)
    drafts = _drafts(rows, stored, np.array(tape.start_s), number, base)
    for item in films:
        if item.node is not None:
            use_pixels(survey, item.node, ", ".join(draft.stream.spec.name for draft in drafts))
    return drafts


def _is_clocked(survey: Survey, film: Screenplay, at_s: float) -> bool:
    """Whether a presented series has a stream already, by its own clock, that is running at a row's start."""
    if film.node is None or not film.node.path.startswith("stimulus/presentation/"):
        return False
    group = survey.file[film.node.path]
    if survey.found.get(film.node.path, (None, ""))[0] is None or not is_group(group):
        return False
    stamps = get(group, "timestamps")
    if is_dataset(stamps):
        return bool(stamps[0] <= at_s <= stamps[-1])
    start_s = float(group["starting_time"][()])
    return start_s <= at_s <= start_s + film.num_frames / (film.rate_hz or np.inf)


def _frames(survey: Survey, rows: Rows, found: Sequence[Found | None], films: Sequence[Screenplay]) -> list[int | None]:
    """Frame (n) that each row names, None where it names a whole film; -1 where the film has no such frame."""
    frames: list[int | None] = []
    starts_at_one = {film.key: _counts_from_one(survey, rows, found, film) for film in films}
    num_beyond = 0
    for item, given in zip(found, rows.frame, strict=True):
        if item is None:
            frames.append(-1)
            continue
        film, own = item
        frame = own if own is not None else int(given) - starts_at_one[film.key] if np.isfinite(given) else None
        if frame is None and not film.is_film:
            frame = 0 if film.num_frames == 1 else -1  # a set of pictures, and no word which of them
        elif own is None and film.num_frames == 1:
            frame = 0  # the number is of the picture in a set that is not here
        if frame is not None and frame >= film.num_frames:
            num_beyond += 1
            frame = -1
        frames.append(frame)
    if num_beyond:
        message = (
            f"{num_beyond} of {len(found)} rows name a frame beyond the last of the film; no frame was shown there"
        )
        survey.note("frame-index", rows.path, message, "repaired", num_outside=float(num_beyond))
    return frames


def _counts_from_one(survey: Survey, rows: Rows, found: Sequence[Found | None], film: Screenplay) -> int:
    """1 where a table counts a film's frames from one to their number, else 0."""
    own = np.array([item is not None and item[0].key == film.key and item[1] is None for item in found], bool)
    given = rows.frame[own & np.isfinite(rows.frame)]
    if film.num_frames < 2 or not len(given) or given.min() != 1 or given.max() != film.num_frames:
        return 0
    message = f"frames of {film.key} count from 1 to {film.num_frames}; they are read from 0"
    survey.note("frames-from-one", rows.path, message, "repaired")
    return 1


def _play(
    rows: Rows, found: Sequence[Found | None], films: Sequence[Screenplay], frames: Sequence[int | None]
) -> _Tape:
    place = {film.key: number for number, film in enumerate(films)}
    tape = _Tape()
    for row, (item, frame) in enumerate(zip(found, frames, strict=True)):
        start_s, stop_s = float(rows.start_s[row]), float(rows.stop_s[row])
        next_s = float(rows.start_s[row + 1]) if row + 1 < len(found) else np.inf
        if item is None or frame == -1:
            tape.clear(start_s)
            continue
        film = item[0]
        frame_s = stop_s - start_s
        if frame is not None:
            tape.show(start_s, place[film.key], frame)
        else:
            frame_s = _frame_s(film)
            end_s = min(stop_s if np.isfinite(stop_s) else np.inf, next_s)
            num_shown = int(min(film.num_frames, np.ceil((end_s - start_s) / frame_s - 1e-6)))
            for number in range(max(1, num_shown)):
                tape.show(start_s + number * frame_s, place[film.key], number)
            film_end_s = start_s + num_shown * frame_s
            if num_shown == film.num_frames and not film_end_s > stop_s - frame_s / 2:
                stop_s = film_end_s  # the film is over before the row is
        gap_s = min(0.5 * frame_s, 1.5 * REFRESH_S)
        if np.isfinite(stop_s) and next_s - stop_s > gap_s:
            tape.clear(stop_s)
    return tape


def _frame_s(film: Screenplay) -> float:
    if film.rate_hz is None:
        raise PrepError(
            f"{film.key} is a film, and neither it nor the table says how fast it was shown; "
            "set rate_hz of its entry in `assets` of the recipe"
        )
    return 1 / film.rate_hz


def _drafts(rows: Rows, stored: Stored, start_s: Floats, number: npt.NDArray[Any], base: str) -> list[Draft]:
    start_ns = to_ns(start_s)
    steps = np.diff(start_ns)
    length_s = float(np.nanmedian(rows.stop_s - rows.start_s)) if np.isfinite(rows.stop_s).any() else 1.0
    sample_ns = int(np.median(steps[steps > 0])) if (steps > 0).any() else max(1, int(to_ns(length_s)))
    drafts = []
    for screen, stimulus in enumerate(stored.stimuli):
        index = np.where(number >= 0, stored.place(screen)[number], -1).astype(np.int32)
        spec = frames_spec(base, stored, screen, sample_ns, len(start_ns), rows.path)
        stream = PlannedStream(spec=spec, start_ns=start_ns, reader=HeldFrames(index=index))
        first_s, last_s = float(start_s[0]), float(start_s[-1])
        drafts.append(Draft(stream=stream, first_s=first_s, last_s=last_s, time_s=start_s, stimuli=(stimulus,)))
    return drafts
