"""Windows of a store as samples and batches.

In: a token store. Out: numpy samples of fixed shape (what is visible, what is asked), and batches of tensors.

Shape suffixes: n tokens, S sources, P samples per token, F frames; see modeling_brainloom.py for the batch.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prep.settings import COUNT_MISSING, TOKEN_NS, ConfigError
from prep.store import Session, Store
from train.config import DataConfig
from train.event_counts import read_counts, read_types
from train.frames import STILL_NS, FrameReader
from train.masking import Mask, TokenTable
from train.modalities import COUNTED, MODALITIES
from train.model.configuration_brainloom import BrainloomConfig
from train.model.processing_brainloom import SESSION, middle, source_null, standardise
from train.sources import CHANNELED, SourceTable, token_streams

Array = npt.NDArray[Any]
IS_COUNTED = np.array([name in COUNTED for name in MODALITIES])
UNKNOWN_HZ = 2.5  # rate of a unit of which the train split has no sample: with the model's limits, .006 to 1,000 Hz


@dataclass(frozen=True)
class Windows:
    """The windows of one split: session, first start and number, block by block."""

    session: npt.NDArray[np.int64]
    start_ns: npt.NDArray[np.int64]
    stop_ns: npt.NDArray[np.int64]
    last: npt.NDArray[np.int64]  # cumulative number of windows
    stride_ns: int
    context_ns: int

    def __len__(self) -> int:
        return int(self.last[-1]) if len(self.last) else 0

    def of_sessions(self) -> dict[int, range]:
        """The windows of each session that has any; the blocks of a session follow each other."""
        spans: dict[int, range] = {}
        first = 0
        for session, last in zip(self.session.tolist(), self.last.tolist(), strict=True):
            spans[session] = range(spans[session].start if session in spans else first, last)
            first = last
        return spans

    def locate(self, index: int, jitter: float = 0.0) -> tuple[int, int]:
        """(session, start_ns) of a window; `jitter` in [0, 1) moves it by a share of the stride, in whole tokens."""
        block = int(np.searchsorted(self.last, index, side="right"))
        place = index - (int(self.last[block - 1]) if block else 0)
        moved = int(jitter * (self.stride_ns // TOKEN_NS)) * TOKEN_NS
        latest = (int(self.stop_ns[block]) - self.context_ns) // TOKEN_NS * TOKEN_NS
        return int(self.session[block]), min(int(self.start_ns[block]) + place * self.stride_ns + moved, latest)


def split_windows(store: Store, label: str, context_s: float, stride_s: float) -> Windows:
    """All windows that lie wholly inside a split; starts are whole multiples of a token."""
    context_ns, stride_ns = round(context_s * 1e9), max(TOKEN_NS, round(stride_s * 1e9) // TOKEN_NS * TOKEN_NS)
    blocks = []
    for index, entry in enumerate(store.entries):
        for start_ns, stop_ns, name in entry["splits"]:
            first = -(-start_ns // TOKEN_NS) * TOKEN_NS
            if name == label and stop_ns - first >= context_ns:
                blocks.append((index, first, stop_ns, (stop_ns - first - context_ns) // stride_ns + 1))
    columns = np.array(blocks, np.int64).reshape(-1, 4)
    session, start, stop, count = columns.T
    return Windows(session, start, stop, np.cumsum(count), stride_ns, context_ns)


@dataclass
class Sources:
    """The sources of a window."""

    modality: npt.NDArray[np.int64]  # (S,) index into the model's MODALITIES
    row: npt.NDArray[np.int64]  # (S,) row of the unit table
    features: npt.NDArray[np.float32]  # (S, U)
    mean: npt.NDArray[np.float32]  # (S,) of the train split
    scale: npt.NDArray[np.float32]  # (S,)
    stream: npt.NDArray[np.int64]  # (S,) index into the session's streams, -1 of an origin, which has no token
    place: npt.NDArray[np.int64]  # (S,) the source's place in its stream; of events, in its vocabulary
    offset_ns: npt.NDArray[np.int64]  # (S,) added to the start of its tokens
    duration_ns: npt.NDArray[np.int64]  # (S,) of its tokens
    sample_s: npt.NDArray[np.float32]  # (S,) of its samples
    of_stimulus: npt.NDArray[np.bool_]  # (S,) is it a type of events of the stimulus


@dataclass
class Window:
    """One window, read: n tokens over S sources, and the stimulus."""

    session: int
    start_ns: int
    sources: Sources
    tokens: TokenTable
    token_ns: npt.NDArray[np.int64]  # (n,) absolute start on the stream's clock, without the source's offset
    sample_s: npt.NDArray[np.float32]  # (n,)
    values: npt.NDArray[np.float32]  # (n, P) standardised
    labels: npt.NDArray[np.float32]  # (n, P) counts for spikes and events, standardised otherwise
    observed: npt.NDArray[np.bool_]  # (n, P)
    pixels: npt.NDArray[np.float32]  # (F, H, W) standardised
    frame_time_s: npt.NDArray[np.float32]  # (F,)


# Source (n,), start on its stream's clock (n,), values (n, P) of tokens, as they were recorded.
Tokens = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]


class WindowReader:
    """Reads windows of a store; holds the store open, so each worker makes its own."""

    def __init__(
        self, store: Store, model: BrainloomConfig, max_frames: int, origins: Collection[str] | None = None
    ) -> None:
        """`origins`: as SourceTable has them."""
        self.store, self.source_table = store, SourceTable(store, origins)
        self.samples_per_token = model.samples_per_token
        self.frames = FrameReader(store, (model.image_size[0], model.image_size[1]), max_frames)
        self._sources: dict[int, Sources] = {}
        self._check_samples()

    def _check_samples(self) -> None:
        for entry in self.store.entries:
            for _, stream in token_streams(entry):
                if stream["samples_per_token"] > self.samples_per_token:
                    raise ConfigError(
                        f"{entry['path']}: stream {stream['name']} has {stream['samples_per_token']} samples "
                        f"per token; the model reads {self.samples_per_token}. Set "
                        "model.overrides.samples_per_token to at least that."
                    )

    def sources(self, index: int) -> Sources:
        """All sources of a session, cached."""
        if index not in self._sources:
            session, entry = self.store.session(index), self.store.entries[index]
            num_features = len(self.store.catalog["features"]["names"])
            features = (
                session.array("units/features") if entry["num_units"] else np.zeros((0, num_features), np.float32)
            )
            parts = [self._sources_of(index, features, *numbered) for numbered in token_streams(entry)]
            origins = _origins(list(self.source_table.origins(entry).values()), num_features)
            self._sources[index] = _joined([_no_sources(num_features), *parts, origins])
        return self._sources[index]

    def _sources_of(self, index: int, features: Array, number: int, stream: dict[str, Any]) -> Sources:
        size, first, entry = stream["num_sources"], stream["first_unit"], self.store.entries[index]
        opened, is_event = self.store.session(index).stream(stream["name"]), stream["kind"] == "event"
        place, mean, scale = np.arange(size), opened.mean, opened.scale
        if is_event:
            place, mean = read_types(opened, entry["splits"])
            scale = np.sqrt(mean)  # the variance of a Poisson count is its mean
        elif stream["modality"] in COUNTED:
            unknown = np.float32(UNKNOWN_HZ * stream["sample_ns"] / 1e9)
            mean, scale = np.where(mean > 0, mean, unknown), np.where(mean > 0, scale, np.sqrt(unknown))
        if first is None:
            rows = self.source_table.channel_rows(entry, stream)[place]
            measured = np.zeros((size, features.shape[1]), np.float32)
        else:
            rows, measured = self.source_table.unit_rows(index, first, size), features[first : first + size]
        return Sources(
            modality=np.full(size, MODALITIES.index(stream["modality"]), np.int64),
            row=rows,
            features=measured,
            mean=mean,
            scale=scale,
            stream=np.full(size, number),
            place=place,
            offset_ns=np.zeros(size, np.int64) if opened.offset_ns is None else opened.offset_ns,
            duration_ns=np.full(size, stream["duration_ns"]),
            sample_s=np.full(size, stream["sample_ns"] / 1e9, np.float32),
            of_stimulus=np.full(size, is_event and opened.spec.modality == "stimulus"),
        )

    def read(
        self,
        index: int,
        start_ns: int,
        context_ns: int,
        max_units: int = 0,
        chance: np.random.Generator | None = None,
        with_frames: bool = True,
    ) -> Window:
        """Read [start_ns, start_ns + context_ns) of a session; `max_units` > 0 draws a subset of its units.

        Raises DigestError where what is read is damaged or missing.
        """
        sources, stop_ns = self.sources(index), start_ns + context_ns
        if max_units and chance is not None:
            sources = _choose_units(sources, max_units, chance)
        tokens = self._read_tokens(index, sources, start_ns, stop_ns)
        session = self.store.session(index)
        frames = self.frames.read(session, start_ns, stop_ns) if with_frames else self.frames.none()
        return _window(index, start_ns, sources, tokens, frames)

    def nothing(self, index: int, start_ns: int) -> Window:
        """A window that has no source and no token: what stands in the place of one that cannot be read."""
        sources, none = _no_sources(len(self.store.catalog["features"]["names"])), np.zeros(0, np.int64)
        values = np.zeros((0, self.samples_per_token), np.float32)
        return _window(index, start_ns, sources, (none, none, values), self.frames.none())

    def _read_tokens(self, index: int, sources: Sources, start_ns: int, stop_ns: int) -> Tokens:
        """All tokens that lie between the two times, on their streams' clocks."""
        session = self.store.session(index)
        parts: list[tuple[str, Array, Array, Array]] = []  # kind, sources, starts (k,), values (k, S, P)
        for number, stream in token_streams(self.store.entries[index]):
            wanted = np.flatnonzero(sources.stream == number)
            if len(wanted):
                parts.append(
                    (stream["kind"], wanted, *_read_stream(session, stream, sources.place[wanted], start_ns, stop_ns))
                )
        num_tokens = sum(read.shape[0] * read.shape[1] for *_, read in parts)
        source, token_ns = np.empty(num_tokens, np.int64), np.empty(num_tokens, np.int64)
        values = np.full((num_tokens, self.samples_per_token), np.nan, np.float32)
        first = 0
        for kind, wanted, begins_ns, read in parts:
            shape, here = read.shape[:2], slice(first, first + read.shape[0] * read.shape[1])
            source[here].reshape(shape)[:] = wanted
            token_ns[here].reshape(shape)[:] = begins_ns[:, None]
            own = values[here].reshape(*shape, self.samples_per_token)[..., : read.shape[2]]
            own[:] = read
            if kind == "counts":
                own[read == COUNT_MISSING] = np.nan
            first = here.stop
        return source, token_ns, values


def _read_stream(
    session: Session, description: dict[str, Any], place: Array, start_ns: int, stop_ns: int
) -> tuple[npt.NDArray[np.int64], Array]:
    """Starts (k,) and values (k, S, P) of the tokens of sources at some places that lie between the two times."""
    stream = session.stream(description["name"])
    if stream.spec.kind == "event":
        return read_counts(stream, place, session.entry["splits"], start_ns, stop_ns)
    tokens = stream.tokens(start_ns, stop_ns - stream.spec.duration_ns + stream.spec.sample_ns // 100 + 1)
    return stream.start_ns[tokens], stream.read(tokens).take(place, axis=1)


def _window(index: int, start_ns: int, sources: Sources, read: Tokens, frames: tuple[Array, Array]) -> Window:
    source, token_ns, values = read
    start_s = (token_ns + sources.offset_ns[source] - start_ns) / 1e9
    modality = sources.modality[source]
    standard = standardise(values, sources.mean[source], sources.scale[source])
    return Window(
        session=index,
        start_ns=start_ns,
        sources=sources,
        tokens=TokenTable(
            modality, source, start_s, start_s + sources.duration_ns[source] / 1e9, sources.of_stimulus[source]
        ),
        token_ns=token_ns,
        sample_s=sources.sample_s[source],
        values=standard,
        labels=np.where(IS_COUNTED[modality][:, None], values, standard),
        observed=~np.isnan(standard),
        pixels=frames[0],
        frame_time_s=frames[1],
    )


def _no_sources(num_features: int) -> Sources:
    """What a session of pixels alone has."""
    none, numbers = np.zeros(0, np.int64), np.zeros(0, np.float32)
    features, flags = np.zeros((0, num_features), np.float32), np.zeros(0, np.bool_)
    return Sources(none, none, features, numbers, numbers, none, none, none, none, numbers, flags)


def _origins(rows: list[int], num_features: int) -> Sources:
    """A session and its subject, by their rows."""
    none, size = np.zeros(len(rows), np.int64), len(rows)
    return Sources(
        modality=np.full(size, SESSION, np.int64),
        row=np.array(rows, np.int64),
        features=np.zeros((size, num_features), np.float32),
        mean=np.zeros(size, np.float32),
        scale=np.ones(size, np.float32),
        stream=none - 1,
        place=none,
        offset_ns=none,
        duration_ns=none,
        sample_s=np.ones(size, np.float32),
        of_stimulus=np.zeros(size, np.bool_),
    )


def _joined(parts: list[Sources]) -> Sources:
    return Sources(*(np.concatenate([getattr(part, name) for part in parts]) for name in Sources.__dataclass_fields__))


def _choose_units(sources: Sources, max_units: int, chance: np.random.Generator) -> Sources:
    is_unit = sources.modality < MODALITIES.index("behavior")
    units = np.flatnonzero(is_unit)
    if len(units) > max_units:
        units = np.sort(chance.permutation(units)[:max_units])
    keep = np.concatenate([units, np.flatnonzero(~is_unit)])
    return Sources(*(getattr(sources, name).take(keep, axis=0) for name in Sources.__dataclass_fields__))


@dataclass(frozen=True)
class Budget:
    """The fixed shape of a sample."""

    num_sources: int
    num_inputs: int
    num_queries: int
    num_frames: int


def budget(store: Store, data: DataConfig, mix: str, origins: Collection[str] | None = None) -> Budget:
    """The shape of every sample of a mix of families: enough for the store's fullest session, and its origins."""
    context_ns = round(data.context_s * 1e9)
    activity = behavior = units = channels = 0
    for entry in store.entries:
        session_units, session_activity, session_behavior, session_channels = 0, 0, 0, 0
        for _, stream in token_streams(entry):
            tokens = stream["num_sources"] * (context_ns // max(1, stream["duration_ns"]) + 1)
            if stream["first_unit"] is not None:
                session_units += stream["num_sources"]
                session_activity = max(session_activity, tokens // stream["num_sources"])
            elif stream["modality"] in CHANNELED:
                session_behavior += tokens
                session_channels += stream["num_sources"]
        units, activity = max(units, min(session_units, data.max_units)), max(activity, session_activity)
        behavior, channels = max(behavior, session_behavior), max(channels, session_channels)
    num_activity = units * activity
    families, everything = mix.split("+"), num_activity + behavior
    inputs = min({"encoding": behavior, "inpainting": everything}.get(name, num_activity) for name in families)
    asked = sum({"decoding": behavior, "inpainting": everything}.get(name, num_activity) for name in families)
    asked = min(asked, everything)
    frames = min(data.max_frames, _most_frames(store, context_ns)) if may_show_frames(mix) else 0
    table = SourceTable(store, origins)
    num_origins = max((len(table.origins(entry)) for entry in store.entries), default=0)
    num_sources = units + channels + num_origins
    return Budget(num_sources, max(1, inputs), max(1, min(asked, data.max_queries)), max(1, frames))


def may_show_frames(mix: str) -> bool:
    """Is the stimulus ever visible in a mix of families?"""
    return {"encoding", "inpainting"}.issuperset(mix.split("+"))


def _most_frames(store: Store, context_ns: int) -> int:
    most = 0
    for entry in store.entries:
        frames = [stream for stream in entry["streams"] if stream["kind"] == "frames"]
        periods = [max(1, int(stream["duration_ns"])) for stream in frames]
        within = [max(context_ns // period, (context_ns - STILL_NS) // period + 1) + 1 for period in periods]
        most = max(most, sum(within))
    return most


def make_sample(
    window: Window, mask: Mask, shape: Budget, chance: np.random.Generator | None = None
) -> dict[str, Array]:
    """One sample of fixed shape. What exceeds the budget is left out by chance, or from the end without it."""
    inputs = _fit(np.flatnonzero(mask.visible), shape.num_inputs, chance)
    asked = _fit(np.flatnonzero(mask.asked), shape.num_queries, chance)
    frames = np.arange(min(len(window.pixels), shape.num_frames) if mask.frames else 0)
    sources, tokens = window.sources, window.tokens
    middle_s = middle(tokens.start_s, tokens.stop_s - tokens.start_s)
    sample = {
        "unit_rows": pad(sources.row, shape.num_sources, -1),
        "unit_features": pad(sources.features, shape.num_sources),
        "source_modality": pad(sources.modality, shape.num_sources),
        "source_null": pad(source_null(sources.modality, sources.mean, sources.scale), shape.num_sources, 1.0),
        "input_values": pad(window.values[inputs], shape.num_inputs),
        "input_observed": pad(window.observed[inputs], shape.num_inputs),
        "input_source": pad(tokens.source[inputs], shape.num_inputs),
        "input_time_s": pad(middle_s[inputs], shape.num_inputs),
        "input_start_s": pad(tokens.start_s[inputs].astype(np.float32), shape.num_inputs),
        "input_sample_s": pad(window.sample_s[inputs], shape.num_inputs, 1.0),
        "input_mask": pad(np.ones(len(inputs), np.bool_), shape.num_inputs),
        "pixels": pad(window.pixels[frames], shape.num_frames),
        "frame_time_s": pad(window.frame_time_s[frames], shape.num_frames),
        "frame_mask": pad(np.ones(len(frames), np.bool_), shape.num_frames),
        "query_source": pad(tokens.source[asked], shape.num_queries),
        "query_time_s": pad(tokens.start_s[asked].astype(np.float32), shape.num_queries),
        "query_sample_s": pad(window.sample_s[asked], shape.num_queries, 1.0),
        "labels": pad(window.labels[asked], shape.num_queries),
        "label_mask": pad(window.observed[asked], shape.num_queries),
    }
    if mask.folds is not None:
        fold = np.full(len(sources.row), -1)
        fold[tokens.source] = mask.folds
        sample["source_fold"] = pad(fold, shape.num_sources, -1)
    return {name: value.astype(np.float32) if value.dtype == np.float64 else value for name, value in sample.items()}


def _fit(indices: Array, limit: int, chance: np.random.Generator | None) -> Array:
    if len(indices) <= limit:
        return indices
    return np.sort(chance.permutation(indices)[:limit]) if chance is not None else indices[:limit]


def pad(array: Array, length: int, value: float = 0) -> Array:
    """Pad the first axis to `length`."""
    padded = np.full((length, *array.shape[1:]), value, array.dtype)
    padded[: len(array)] = array
    return padded


def collate(samples: list[dict[str, Array]], pinned: bool = False) -> dict[str, Tensor]:
    """Stack samples into a batch of tensors; in pinned memory it goes to a GPU while that works."""
    batch = {}
    for name, first in samples[0].items():
        stacked = torch.empty((len(samples), *first.shape), dtype=getattr(torch, first.dtype.name), pin_memory=pinned)
        np.stack([sample[name] for sample in samples], out=stacked.numpy())
        batch[name] = stacked
    return batch


def collate_windows(windows: list[Window], masks: list[Mask]) -> dict[str, Tensor]:
    """A batch of windows under masks, in the smallest shape that holds them all."""
    largest = Budget(
        max(len(window.sources.row) for window in windows),
        max(1, *(int(mask.visible.sum()) for mask in masks)),
        max(1, *(int(mask.asked.sum()) for mask in masks)),
        max(1, *(len(window.pixels) * mask.frames for window, mask in zip(windows, masks, strict=True))),
    )
    return collate([make_sample(window, mask, largest) for window, mask in zip(windows, masks, strict=True)])
