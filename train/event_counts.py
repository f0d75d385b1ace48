"""Typed events as counts: licks, rewards, onsets of stimuli in the bins of spikes, a source for each type.

In: an event stream of a session, a stretch of time. Out: which types are read, how often they come, tokens of counts.

Events of several types are a marked point process (Daley & Vere-Jones 2003, chapter 7). Where intensities are constant
within a bin, its likelihood asks nothing of a bin but how many events of each type it holds.

Shapes: S types that are read, k tokens, P bins of a token.
"""

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.settings import BIN_NS, TOKEN_NS
from prep.store import Stream

Array = npt.NDArray[Any]
Split = tuple[int, int, str]  # start_ns, stop_ns, label

MAX_TYPES = 64  # of a stream; of more, the most frequent ones are read
BINS = TOKEN_NS // BIN_NS
SELDOM = 0.5  # of an event: what the train split does not have is taken to have come half a time
NO_TRAIN_RATE = 1e-4  # events in a bin, where there is no train split


def as_read(stream: dict[str, Any]) -> dict[str, Any]:
    """A stream of a catalog's entry as the model reads it: one of events as counts, a channel for each type.

    The channels are all types of its vocabulary; `num_sources` of them are read.
    """
    if stream["kind"] != "event":
        return stream
    return {
        **stream,
        "modality": "events",
        "channels": [f"{stream['name']}/{type_}" for type_ in stream["types"]],
        "num_sources": min(len(stream["types"]), MAX_TYPES),
        "samples_per_token": BINS,
        "duration_ns": TOKEN_NS,
        "sample_ns": BIN_NS,
    }


def read_types(stream: Stream, splits: list[Split]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Which types are read (S,), as places in the vocabulary, and their mean count in a bin of the train split (S,).

    Means are positive. Warns where types are left out.
    """
    assert stream.types is not None
    counts, train_ns = np.zeros(len(stream.spec.types), np.int64), 0
    for start_ns, stop_ns, label in splits:
        if label == "train":
            counts += np.bincount(stream.types[stream.tokens(start_ns, stop_ns)], minlength=len(counts))
            train_ns += stop_ns - start_ns
    place = np.sort(np.argsort(-counts, kind="stable")[:MAX_TYPES])
    if len(place) < len(counts):
        left_out, total = int(counts.sum() - counts[place].sum()), int(counts.sum())
        warnings.warn(
            f"{stream.spec.origin or stream.spec.name} has {len(counts)} types of events; the {MAX_TYPES} most "
            f"frequent of its train split are read, {left_out} of its {total} events there are not.",
            stacklevel=2,
        )
    if not train_ns:
        return place, np.full(len(place), NO_TRAIN_RATE, np.float32)
    return place, (np.maximum(counts[place], SELDOM) * BIN_NS / train_ns).astype(np.float32)


def read_counts(
    stream: Stream, place: Array, splits: list[Split], start_ns: int, stop_ns: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Starts (k,) and counts (k, S, P) of the tokens from `start_ns` on that end by `stop_ns`; NaN = not recorded.

    Windows start at whole tokens of the session's clock, so that the bins are those of spikes.
    """
    assert stream.types is not None
    num_tokens = (stop_ns - start_ns) // TOKEN_NS
    num_bins, size = num_tokens * BINS, len(place)
    events = stream.tokens(start_ns, start_ns + num_tokens * TOKEN_NS)
    column_of = np.full(len(stream.spec.types), -1, np.int64)
    column_of[place] = np.arange(size)
    column, bin_ = column_of[stream.types[events]], (stream.start_ns[events] - start_ns) // BIN_NS
    is_read = column >= 0
    counts = np.bincount(bin_[is_read] * size + column[is_read], minlength=num_bins * size).astype(np.float32)
    counts = counts.reshape(num_bins, size)
    counts[~recorded_bins(splits, start_ns, num_bins)] = np.nan
    token_ns = start_ns + np.arange(num_tokens, dtype=np.int64) * TOKEN_NS
    return token_ns, counts.reshape(num_tokens, BINS, size).transpose(0, 2, 1)


def recorded_bins(splits: list[Split], start_ns: int, num_bins: int) -> npt.NDArray[np.bool_]:
    """Which bins from `start_ns` on lie wholly inside a block of the session's splits: where it was being recorded."""
    recorded = np.zeros(num_bins, np.bool_)
    for first_ns, last_ns, _ in splits:
        first, stop = -((start_ns - first_ns) // BIN_NS), (last_ns - start_ns) // BIN_NS
        recorded[max(0, first) : max(0, stop)] = True
    return recorded
