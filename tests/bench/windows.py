"""Random windows of the benchmark's session: where they lie, the bare memmaps of them, and rates in turns.

In: a folder that tests/bench/reader.py has filled. Out: windows a second of CPU. numpy alone: peers import it too.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Read = Callable[[int], list[Array]]  # the values of a window by its number, stream by stream
WINDOW_NS = 2_000_000_000
AT_ONCE = 50  # windows between two looks at the clock


class Windows:
    """Random windows: `start_ns` (N,), and the tokens of each in each stream, `tokens` (N, streams, 2)."""

    def __init__(self, folder: Path) -> None:
        content = np.load(folder / "windows.npz")
        self.start_ns, self.tokens = content["start_ns"], content["tokens"]
        self.streams: dict[str, dict[str, Any]] = json.loads((folder / "streams.json").read_text())
        self.folder = folder

    def __len__(self) -> int:
        return len(self.start_ns)

    def slices(self) -> list[list[slice]]:
        """The tokens of each window, stream by stream."""
        return [[slice(first, last) for first, last in window] for window in self.tokens.tolist()]

    def memmaps(self) -> Read:
        """One slice of one bare memmap per stream, its place known beforehand: the limit."""
        held = [
            np.asarray(np.memmap(self.folder / name, stream["dtype"], "r", shape=tuple(stream["shape"])))
            for name, stream in self.streams.items()
        ]
        slices = self.slices()
        return lambda number: [values[tokens] for values, tokens in zip(held, slices[number], strict=True)]

    def room(self, size: int = 1) -> list[Array]:
        """Arrays for `size` windows, stream by stream."""
        longest = (self.tokens[..., 1] - self.tokens[..., 0]).max(axis=0).tolist()
        streams = self.streams.values()
        return [np.zeros((size, k, *s["shape"][1:]), s["dtype"]) for k, s in zip(longest, streams, strict=True)]


def copied_into(read: Read, room: list[Array], num_windows: int) -> Iterator[None]:
    """Windows copied into arrays that are there already, one after the other, for ever."""
    while True:
        for number in range(num_windows):
            for values, place in zip(read(number), room, strict=True):
                place[0, : len(values)] = values
            yield


def rate(windows: Iterator[Any], seconds: float) -> float:
    """How many of them a second of CPU gives, all threads of this process counted."""
    count, began_s = 0, time.process_time()
    while (took_s := time.process_time() - began_s) < seconds:
        for _ in range(AT_ONCE):
            next(windows)
        count += AT_ONCE
    return count / took_s


def in_turns(roads: Mapping[str, Iterator[Any]], turns: int, seconds: float) -> dict[str, list[float]]:
    """The rates of several roads, one after the other in each turn: a machine's speed changes for all alike."""
    found: dict[str, list[float]] = {name: [] for name in roads}
    for _ in range(turns):
        for name, windows in roads.items():
            found[name].append(rate(windows, seconds))
    return found
