"""The order of windows: a pure function of (seed, pass, position).

In: positions. Out: a keyed bijection, each sample's own chance, the positions of a rank; neither the number of ranks
nor of workers has a say. The state of the data is the position and the eras (train/eras.py): sessions that were added
to the store come in at the position where the run was resumed. From there the first pass takes what the running one had
not seen yet and every new window, each once, in an order of its own; before it nothing changes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_ROUNDS = 4
_MASK = (1 << 64) - 1


def mix(value: int, key: int) -> int:
    """A 64-bit integer hash (splitmix64, Steele 2014)."""
    value = (value + (key + 1) * 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def permute(index: int, size: int, key: int) -> int:
    """A keyed bijection of [0, size): a Feistel network (Luby & Rackoff 1988), walked until it falls inside."""
    half = max(1, (max(1, size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_ in range(_ROUNDS):
            left, right = right, left ^ (mix(right, key * _ROUNDS + round_) & mask)
        index = left << half | right
        if index < size:
            return index


@dataclass(frozen=True)
class Draw:
    """What stands at one position of the run."""

    position: int
    pass_: int
    window: int  # index into the windows of the split

    def generator(self, seed: int) -> np.random.Generator:
        """The sample's own source of chance: mask, unit sub-sample, jitter."""
        return np.random.Generator(np.random.Philox(key=np.array([seed, self.position], np.uint64)))


def positions(
    first_step: int, num_steps: int, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int
) -> Iterator[list[int]]:
    """The micro-batches of one rank, as positions: the global batch is cut into ranks last."""
    per_rank = global_batch_size // world_size
    for step in range(first_step, num_steps):
        begin = step * global_batch_size + rank * per_rank
        for micro in range(begin, begin + per_rank, micro_batch_size):
            yield list(range(micro, micro + micro_batch_size))
