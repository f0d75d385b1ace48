"""Sources of a store: which row of the unit table belongs to which unit or behaviour channel.

In: the catalog. Out: row numbers by session, and the stable key of every row.
A unit's key is its unit_key; a channel's is dataset/channel, that of a type of events dataset/stream/type; both are
shared by the sessions of the dataset.
"""

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.store import Store
from train.event_counts import as_read
from train.modalities import Modality

READ_KINDS = ("counts", "trace", "event")  # frames are read apart
CHANNELED: tuple[Modality, ...] = ("behavior", "events")  # their sources are channels, no units


def token_streams(entry: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """The streams of a session as the model reads their tokens, with their numbers in the catalog's entry."""
    return [(number, as_read(stream)) for number, stream in enumerate(entry["streams"]) if stream["kind"] in READ_KINDS]


def stream_channels(entry: dict[str, Any], stream: dict[str, Any]) -> list[str]:
    """Keys of a stream's channels: of behaviour, or the types of an event stream's vocabulary."""
    return [f"{entry['dataset_id']}/{channel}" for channel in stream["channels"]]


class SourceTable:
    """Rows of the unit table for one store: units session by session, then channels, then types of events."""

    def __init__(self, store: Store) -> None:
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

    @property
    def channel_keys(self) -> list[str]:
        """Keys of the channels and types of events, in the order of their rows."""
        return list(self._channel_row)

    def __len__(self) -> int:
        return int(self.first_row[-1]) + len(self._channel_row)

    def unit_rows(self, session: int, first_unit: int, num_units: int) -> npt.NDArray[np.int64]:
        """Rows of units [first_unit, first_unit + num_units) of a session."""
        first = int(self.first_row[session]) + first_unit
        return np.arange(first, first + num_units, dtype=np.int64)

    def channel_rows(self, entry: dict[str, Any], stream: dict[str, Any]) -> npt.NDArray[np.int64]:
        """Rows of a stream's channels, or of the types of its vocabulary."""
        return np.array([self._channel_row[key] for key in stream_channels(entry, stream)], np.int64)

    @cached_property
    def keys(self) -> list[str]:
        """The key of every row; opens every session."""
        keys: list[str] = []
        for index, entry in enumerate(self._store.entries):
            if entry["num_units"]:
                keys += self._store.session(index).text("units/unit_key")
        return keys + list(self._channel_row)
