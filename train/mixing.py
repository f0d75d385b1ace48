"""Mixing weights: how often the windows of a dataset, a session, a modality come in one pass.

In: the weights of a run's configuration, the sessions of a store. Out: a weight for each session; a Pool, whose tickets
are what a pass goes over: a window of weight 2 has two of them, of weight 0.5 one in every second pass.
"""

import difflib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

from prep.settings import ConfigError
from train.config import Weights
from train.sampler import mix, permute

_SHARE = 1 << 33  # keys of shares are not those of passes and eras


def session_key(entry: dict[str, Any]) -> str:
    """The name of a session in weights and checkpoints."""
    return f"{entry['dataset_id']}/{entry['session_id']}"


def session_weights(entries: Sequence[dict[str, Any]], weights: Weights, turns_of: str = "") -> dict[str, float]:
    """The weight of each session: the product of those of its dataset, itself and each modality that it has.

    `turns_of`: in the turns of this mix of families, whose own weights of modalities stand before the others.
    """
    of_modality = weights.modalities | weights.families.get(turns_of, {})
    keys = [session_key(entry) for entry in entries]
    _check_names("datasets", weights.datasets, {entry["dataset_id"] for entry in entries})
    _check_names("sessions", weights.sessions, keys)
    result = {}
    for key, entry in zip(keys, entries, strict=True):
        weight = weights.datasets.get(entry["dataset_id"], 1.0) * weights.sessions.get(key, 1.0)
        for modality in sorted({stream["modality"] for stream in entry["streams"]}):
            weight *= of_modality.get(modality, 1.0)
        result[key] = weight
    return result


def _check_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    for name in sorted(set(given) - set(known)):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"It has {', '.join(sorted(known)[:10])}."
        raise ConfigError(f"data.weights.{what}: the store has no {name!r}. {hint}")


class Pool:
    """Sessions as tickets, each of which stands for one window; a pass goes over all tickets.

    Sessions of equal weight share their tickets, so that a session of few windows gets its part of them, too.
    """

    def __init__(self, sessions: Iterable[tuple[range, float]], key: int) -> None:
        """`sessions`: the windows of each, and its weight."""
        of_weight: dict[float, list[range]] = {}
        for windows, weight in sessions:
            of_weight.setdefault(weight, []).append(windows)
        self._shares = [
            _Share(windows, weight, mix(key, _SHARE + n)) for n, (weight, windows) in enumerate(of_weight.items())
        ]
        self._last = list(accumulate(share.num_tickets for share in self._shares))

    def __len__(self) -> int:
        return self._last[-1] if self._last else 0

    def window(self, pass_: int, ticket: int) -> int:
        """The window that a ticket stands for in a pass."""
        number = bisect_right(self._last, ticket)
        return self._shares[number].window(pass_, ticket - (self._last[number - 1] if number else 0))


class _Share:
    """The sessions of one weight."""

    def __init__(self, windows: list[range], weight: float, key: int) -> None:
        self._windows, self._key = windows, key
        self._last = list(accumulate(map(len, windows)))
        self.num_tickets = round(weight * self._last[-1])

    def window(self, pass_: int, ticket: int) -> int:
        """Ticket after ticket and pass after pass, each round takes every window once."""
        num_windows = self._last[-1]
        round_, place = divmod(pass_ * self.num_tickets + ticket, num_windows)
        if self.num_tickets % num_windows:  # a pass ends inside a round: it takes some windows of every session
            place = permute(place, num_windows, mix(self._key, round_))
        number = bisect_right(self._last, place)
        return self._windows[number][place - (self._last[number - 1] if number else 0)]
