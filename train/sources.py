"""Sources of a store: which row of the unit table belongs to which unit, behaviour channel, session or subject.

In: the catalog. Out: row numbers by session, and the stable key of every row.
A unit's key is its unit_key; a channel's is dataset/channel, that of a type of events dataset/stream/type; both are
shared by the sessions of the dataset. The origins of a session, dataset/session:… and dataset/subject:…, are sources
without tokens: their rows are added to all latents.
"""

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.store import Store
from train.event_counts import as_read
from train.modalities import Modality

READ_KINDS = ("counts", "trace", "event")  # frames are read apart
CHANNELED: tuple[Modality, ...] = ("behavior", "events")  # their sources are channels, no units
ORIGINS = ("session", "subject")


def token_streams(entry: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """The streams of a session as the model reads their tokens, with their numbers in the catalog's entry."""
    return [(number, as_read(stream)) for number, stream in enumerate(entry["streams"]) if stream["kind"] in READ_KINDS]


def stream_channels(entry: dict[str, Any], stream: dict[str, Any]) -> list[str]:
    """Keys of a stream's channels: of behaviour, or the types of an event stream's vocabulary."""
    return [f"{entry['dataset_id']}/{channel}" for channel in stream["channels"]]


def origin_keys(entry: dict[str, Any], kinds: Sequence[str] = ORIGINS) -> list[str]:
    """Keys of the session, and of its subject if that is known."""
    return [f"{entry['dataset_id']}/{kind}:{entry[f'{kind}_id']}" for kind in kinds if entry[f"{kind}_id"]]


def telling_origins(entries: Sequence[dict[str, Any]]) -> set[str]:
    """Sessions where there are several, and subjects where there are several: one alone tells nothing apart."""
    found = [{key for entry in entries for key in origin_keys(entry, [kind])} for kind in ORIGINS]
    return {key for keys in found if len(keys) > 1 for key in keys}


class SourceTable:
    """Rows of the unit table for one store: units session by session, channels, types of events, origins."""

    def __init__(self, store: Store, origins: Collection[str] | None = None) -> None:
        """`origins`: keys of those that may have a row, others have none; those that tell sessions apart if None."""
        self._store = store
        counts = [int(entry["num_units"]) for entry in store.entries]
        self.first_row = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        keys: dict[Modality, set[str]] = {modality: set() for modality in CHANNELED}
        for entry in store.entries:
            for _, stream in token_streams(entry):
                if stream["modality"] in CHANNELED:
                    keys[stream["modality"]].update(stream_channels(entry, stream))
        channels = dict.fromkeys(key for modality in CHANNELED for key in sorted(keys[modality]))
        self._channel_row = {key: int(self.first_row[-1]) + i for i, key in enumerate(channels)}
        chosen = telling_origins(store.entries) if origins is None else origins
        found = sorted({key for entry in store.entries for key in origin_keys(entry) if key in chosen})
        self._origin_row = {key: int(self.first_row[-1]) + len(channels) + i for i, key in enumerate(found)}

    @property
    def channel_keys(self) -> list[str]:
        """Keys of the channels and types of events, in the order of their rows."""
        return list(self._channel_row)

    @property
    def origin_keys(self) -> list[str]:
        """Keys of the origins that have a row, in the order of their rows."""
        return list(self._origin_row)

    def __len__(self) -> int:
        return int(self.first_row[-1]) + len(self._channel_row) + len(self._origin_row)

    def unit_rows(self, session: int, first_unit: int, num_units: int) -> npt.NDArray[np.int64]:
        """Rows of units [first_unit, first_unit + num_units) of a session."""
        first = int(self.first_row[session]) + first_unit
        return np.arange(first, first + num_units, dtype=np.int64)

    def channel_rows(self, entry: dict[str, Any], stream: dict[str, Any]) -> npt.NDArray[np.int64]:
        """Rows of a stream's channels, or of the types of its vocabulary."""
        return np.array([self._channel_row[key] for key in stream_channels(entry, stream)], np.int64)

    def origins(self, entry: dict[str, Any]) -> dict[str, int]:
        """Row of each origin of a session that has one, by key: at most the session's and its subject's."""
        return {key: self._origin_row[key] for key in origin_keys(entry) if key in self._origin_row}

    @cached_property
    def keys(self) -> list[str]:
        """The key of every row; opens every session."""
        keys: list[str] = []
        for index, entry in enumerate(self._store.entries):
            if entry["num_units"]:
                keys += self._store.session(index).text("units/unit_key")
        return [*keys, *self._channel_row, *self._origin_row]
