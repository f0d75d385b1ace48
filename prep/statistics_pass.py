"""What the train split says about each source of a stream: mean, scale and the features of units.

In: a stream's tokens as written, block by block. Out: mean, scale (S,) and features (S, 7), float32.
Legend: K tokens, S sources, P samples per token. Definitions: FORMAT.md, "Statistics" and "Features".
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.settings import STREAM_FEATURES
from prep.shards import is_missing
from prep.store import StreamSpec

Float = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

BLOCK_VALUES = 2**20  # values held at once: 8 MiB of float64, and a handful of temporaries
MEAN_FLOOR = 1e-4  # counts per bin
COUNT_SCALE_FLOOR = 1e-2  # the standard deviation of a Poisson count at MEAN_FLOOR
SCALE_FLOOR = 1e-6
FEATURE_LIMIT = 10.0
NEIGHBOUR = 1.5  # tokens further apart than this many durations are not neighbours


@dataclass(frozen=True)
class Statistics:
    """Of one stream, over the train split."""

    mean: npt.NDArray[np.float32]  # (S,)
    scale: npt.NDArray[np.float32]  # (S,)
    features: npt.NDArray[np.float32]  # (S, 7) settings.STREAM_FEATURES


class Moments:
    """Sums of one variable per source, about a shift near its values, so that large offsets do not cancel."""

    def __init__(self, num_sources: int) -> None:
        self.n, self.s1, self.s2, self.s3 = (np.zeros(num_sources) for _ in range(4))

    def add(self, values: Float, seen: Bool) -> None:
        """Add values (n, S), of which `seen` count."""
        x = np.where(seen, values, 0.0)
        self.n += seen.sum(0)
        self.s1 += x.sum(0)
        self.s2 += (x * x).sum(0)
        self.s3 += (x * x * x).sum(0)

    @property
    def mean(self) -> Float:
        return ratio(self.s1, self.n)

    @property
    def var(self) -> Float:
        return np.maximum(ratio(self.s2, self.n) - self.mean**2, 0.0)

    @property
    def skewness(self) -> Float:
        third = ratio(self.s3, self.n) - 3 * self.mean * ratio(self.s2, self.n) + 2 * self.mean**3
        return ratio(third, self.var**1.5)


class Pairs:
    """Sums of two variables per source that are seen together."""

    def __init__(self, num_sources: int) -> None:
        self.n, self.x, self.y, self.xx, self.yy, self.xy = (np.zeros(num_sources) for _ in range(6))

    def add(self, x: Float, y: Float, seen: Bool) -> None:
        """Add pairs (n, S), of which `seen` count."""
        x, y = np.where(seen, x, 0.0), np.where(seen, y, 0.0)
        self.n += seen.sum(0)
        for total, part in zip((self.x, self.y, self.xx, self.yy, self.xy), (x, y, x * x, y * y, x * y), strict=True):
            total += part.sum(0)

    @property
    def correlation(self) -> Float:
        """Pearson's, 0 where either does not vary."""
        mean_x, mean_y = ratio(self.x, self.n), ratio(self.y, self.n)
        var_x = np.maximum(ratio(self.xx, self.n) - mean_x**2, 0.0)
        var_y = np.maximum(ratio(self.yy, self.n) - mean_y**2, 0.0)
        return ratio(ratio(self.xy, self.n) - mean_x * mean_y, np.sqrt(var_x * var_y))


def ratio(top: Float, bottom: Float) -> Float:
    """top / bottom, 0 where the bottom is (as good as) 0."""
    result: Float = np.divide(top, bottom, out=np.zeros_like(top), where=np.abs(bottom) > 1e-30)
    return result


class Pass:
    """One walk over a stream's train tokens, in order."""

    def __init__(self, spec: StreamSpec) -> None:
        size = spec.num_sources
        self.spec = spec
        self.shift: Float = np.full(size, np.nan)  # the first observed sample of each source
        self.population_shift = np.nan
        self.samples, self.sums = Moments(size), Moments(size)
        self.sample_pairs, self.token_pairs, self.population = Pairs(size), Pairs(size), Pairs(size)
        self.carry: tuple[Float, Bool] | None = None  # the last token's mean (S,), for its neighbour in the next block

    def add(self, values: npt.NDArray[Any], is_neighbour: Bool) -> None:
        """Add tokens (k, S, P); `is_neighbour` (k,): follows the token before without a gap."""
        seen = ~is_missing(values, self.spec.rows().fill) & np.isfinite(values)  # (k, S, P)
        x = np.where(seen, values, 0.0).astype(np.float64)
        self._set_shift(x, seen)
        x = np.where(seen, x - np.nan_to_num(self.shift)[:, None], 0.0)
        per_sample = [(x[:, :, p], seen[:, :, p]) for p in range(values.shape[2])]
        for value, mask in per_sample:
            self.samples.add(value, mask)
        for (a, seen_a), (b, seen_b) in itertools.pairwise(per_sample):
            self.sample_pairs.add(a, b, seen_a & seen_b)
        total = x.sum(2)
        self.sums.add(total, seen.all(2))
        self._add_tokens(ratio(total, seen.sum(2).astype(np.float64)), seen.any(2), is_neighbour)

    def _set_shift(self, x: Float, seen: Bool) -> None:
        unset = np.isnan(self.shift)
        first = seen.transpose(0, 2, 1).reshape(-1, seen.shape[1])
        values = x.transpose(0, 2, 1).reshape(-1, seen.shape[1])
        found = first.any(0) & unset
        self.shift[found] = values[first.argmax(0), np.arange(len(found))][found]

    def _add_tokens(self, mean: Float, seen: Bool, is_neighbour: Bool) -> None:
        """Token means (k, S), about the shift."""
        level = np.where(seen, mean + np.nan_to_num(self.shift), 0.0)
        population = ratio(level.sum(1), seen.sum(1).astype(np.float64))
        if np.isnan(self.population_shift) and seen.any():
            self.population_shift = population[seen.any(1).argmax()]
        others = np.broadcast_to((population - np.nan_to_num(self.population_shift))[:, None], mean.shape)
        self.population.add(mean, others, seen)
        if self.carry is not None:
            mean, seen = np.concatenate([self.carry[0][None], mean]), np.concatenate([self.carry[1][None], seen])
        else:
            is_neighbour = is_neighbour[1:]
        self.token_pairs.add(mean[:-1], mean[1:], seen[:-1] & seen[1:] & is_neighbour[:, None])
        self.carry = mean[-1], seen[-1]

    def result(self) -> Statistics:
        """Mean, scale and features of what was added."""
        seen = self.samples.n > 0
        mean, std = self.samples.mean + np.nan_to_num(self.shift), np.sqrt(self.samples.var)
        features = np.where(seen[:, None], self._features(mean, std), 0.0)
        features = np.clip(np.nan_to_num(features), -FEATURE_LIMIT, FEATURE_LIMIT)
        is_counts = self.spec.kind == "counts"
        scale = np.maximum(std, COUNT_SCALE_FLOOR if is_counts else SCALE_FLOOR)
        mean = np.maximum(mean, MEAN_FLOOR) if is_counts else mean
        varies = seen & (is_counts | (std > 0))  # a trace that is constant here may move elsewhere: never divide by ~0
        mean, scale = np.where(seen, mean, 0.0), np.where(varies, scale, 1.0)
        return Statistics(mean.astype(np.float32), scale.astype(np.float32), features.astype(np.float32))

    def _features(self, mean: Float, std: Float) -> Float:
        num_samples = self.spec.samples_per_token
        is_counts = self.spec.kind == "counts"
        token_sum = self.sums.mean + num_samples * np.nan_to_num(self.shift)
        rate_hz = mean / (self.spec.sample_ns * 1e-9)
        by_name = {
            "log_rate": np.log(np.maximum(rate_hz, 0.0) + 0.01) if is_counts else np.zeros_like(mean),
            "cv": ratio(std, np.abs(mean)),
            "fano_token": ratio(self.sums.var, token_sum) if is_counts else np.zeros_like(mean),
            "autocorr_sample": (self.sample_pairs if num_samples > 1 else self.token_pairs).correlation,
            "autocorr_token": self.token_pairs.correlation,
            "skewness": self.samples.skewness,
            "population_coupling": self.population.correlation,
        }
        return np.stack([by_name[name] for name in STREAM_FEATURES], axis=1)


def in_blocks(
    start_ns: npt.NDArray[np.int64],
    duration_ns: int,
    offset_ns: npt.NDArray[np.int64] | None,
    blocks: Sequence[tuple[int, int]],
) -> npt.NDArray[np.int64]:
    """For each token (K,): the block [start, stop) that holds it whole, for every source; -1 = none does."""
    early, late = (0, 0) if offset_ns is None or not len(offset_ns) else (int(offset_ns.min()), int(offset_ns.max()))
    block = np.full(len(start_ns), -1, np.int64)
    for number, (start, stop) in enumerate(blocks):
        block[(start_ns + early >= start) & (start_ns + late + duration_ns <= stop)] = number
    return block


def stream_statistics(
    spec: StreamSpec,
    start_ns: npt.NDArray[np.int64],
    offset_ns: npt.NDArray[np.int64] | None,
    train: Sequence[tuple[int, int]],
    read: Callable[[int, int], npt.NDArray[Any]],
) -> Statistics:
    """Statistics of a stream whose tokens [a, b) are `read(a, b)`, over the blocks `train`.

    Memory is bounded by BLOCK_VALUES, and the blocks never depend on how the work was spread: same bytes every time.
    """
    work = Pass(spec)
    if spec.kind in ("frames", "event"):  # indices of frames, and fields of different units, have no mean
        return work.result()
    block = in_blocks(start_ns, spec.duration_ns, offset_ns, train)
    same_block = np.concatenate([[False], block[1:] == block[:-1]])
    gap = np.diff(start_ns, prepend=start_ns[:1])
    is_neighbour = same_block & (gap <= NEIGHBOUR * spec.duration_ns)
    for first, stop in _runs(block >= 0, max(1, BLOCK_VALUES // max(1, spec.num_sources * spec.samples_per_token))):
        work.add(read(first, stop), is_neighbour[first:stop])
    return work.result()


def _runs(wanted: Bool, limit: int) -> Iterator[tuple[int, int]]:
    """Stretches [a, b) of wanted tokens, at most `limit` long."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], wanted, [False]]).astype(np.int8)))
    for first, stop in zip(edges[::2], edges[1::2], strict=True):
        for start in range(int(first), int(stop), limit):
            yield start, min(start + limit, int(stop))
