"""What the train split says about each source of a stream: mean, scale and the features of units.

In: the tokens of one shard while they are in memory; then the parts of all shards. Out: mean, scale (S,) and features
(S, 7), float32. A part depends on its shard alone and parts are merged in order: the same bytes whoever wrote which.
Legend: K tokens, S sources, P samples per token. Definitions: FORMAT.md, "Statistics" and "Features".
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.settings import STREAM_FEATURES
from prep.shards import is_missing
from prep.store import StreamSpec

Float = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]
Part = dict[str, Float]  # of one shard: central moments by name, and the tokens at its borders

BLOCK_VALUES = 2**17  # values held at once: 1 MiB of float64, so that a handful of passes stay in the cache
FEW_COLUMNS = 8  # from so many on numpy adds them in another order
MEAN_FLOOR = 1e-4  # counts per bin
COUNT_SCALE_FLOOR = 1e-2  # the standard deviation of a Poisson count at MEAN_FLOOR
SCALE_FLOOR = 1e-6
FEATURE_LIMIT = 10.0
NEIGHBOUR = 1.5  # tokens further apart than this many durations are not neighbours
MOMENTS = ("samples", "sums")  # n, mean, second and third central moment, (4, S) each
PAIRS = ("sample_pairs", "token_pairs", "population")  # n, means, central second moments and product, (6, S) each


@dataclass(frozen=True)
class Statistics:
    """Of one stream, over the train split."""

    mean: npt.NDArray[np.float32]  # (S,)
    scale: npt.NDArray[np.float32]  # (S,)
    features: npt.NDArray[np.float32]  # (S, 7) settings.STREAM_FEATURES


@dataclass(frozen=True)
class TrainTokens:
    """Which tokens of a stream count, and which follow the token before without a gap, (K,) each."""

    wanted: Bool
    is_neighbour: Bool


def train_tokens(
    spec: StreamSpec,
    start_ns: npt.NDArray[np.int64],
    offset_ns: npt.NDArray[np.int64] | None,
    train: Sequence[tuple[int, int]],
) -> TrainTokens:
    """Tokens that lie wholly inside one of the blocks [start_ns, stop_ns) of `train`."""
    block = in_blocks(start_ns, spec.duration_ns, offset_ns, train)
    same_block = np.concatenate([[False], block[1:] == block[:-1]])[: len(block)]
    gap = np.diff(start_ns, prepend=start_ns[:1])
    return TrainTokens(block >= 0, same_block & (block >= 0) & (gap <= NEIGHBOUR * spec.duration_ns))


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


def ratio(top: Float, bottom: Float) -> Float:
    """top / bottom, 0 where the bottom is (as good as) 0."""
    result: Float = np.divide(top, bottom, out=np.zeros_like(top), where=np.abs(bottom) > 1e-30)
    return result


# ---------------------------------------------------------------- one shard


def shard_part(spec: StreamSpec, tokens: TrainTokens, first: int, values: npt.NDArray[Any]) -> Part:
    """The part of a shard whose tokens `values` (k, S, P) are the stream's tokens [first, first + k)."""
    if spec.kind in ("frames", "event"):  # indices of frames, and fields of different units, have no mean
        return {}
    sums = _Sums(spec)
    limit = max(1, BLOCK_VALUES // max(1, spec.num_sources * spec.samples_per_token))
    wanted = tokens.wanted[first : first + len(values)]
    for start, stop in _runs(wanted, limit):
        sums.add(values[start:stop], tokens.is_neighbour[first + start : first + stop])
    inside = np.flatnonzero(wanted)
    part = sums.part()
    if len(inside):
        part["edges"] = np.array([first + inside[0], first + inside[-1]], np.float64)
    return part


class _Sums:
    """Sums over the tokens of one shard, about a shift near the values, so that large offsets do not cancel."""

    def __init__(self, spec: StreamSpec) -> None:
        self.spec, size = spec, spec.num_sources
        self.shift: Float = np.full(size, np.nan)  # the first observed sample of each source
        self.population_shift = np.nan
        self.moments = {name: np.zeros((4, size)) for name in MOMENTS}  # n, sums of x, x^2, x^3
        self.pairs = {name: np.zeros((6, size)) for name in PAIRS}  # n, sums of x, y, xx, yy, xy
        self.first: tuple[Float, Bool] | None = None  # mean (S,) of the first token, and whether it was seen
        self.last: tuple[Float, Bool] | None = None

    def add(self, values: npt.NDArray[Any], is_neighbour: Bool) -> None:
        """Add tokens (k, S, P); `is_neighbour` (k,): follows the token before without a gap."""
        k, num_sources, num_samples = values.shape
        x = values.reshape(k, -1).astype(np.float64)  # columns: source by source, sample by sample
        if self._add_whole(values, x, is_neighbour):
            return
        seen = ~is_missing(values, self.spec.rows().fill).reshape(k, -1)
        seen &= np.isfinite(x)
        self._set_shift(x.reshape(values.shape), seen.reshape(values.shape))
        x -= np.repeat(np.nan_to_num(self.shift), num_samples)
        x[~seen] = 0.0
        self._add_samples(x, seen, num_samples)
        total, num_seen = _totals(x, num_samples), _totals(seen.astype(np.float64), num_samples)
        whole = num_seen == num_samples
        kept = np.where(whole, total, 0.0)
        self.moments["sums"] += np.stack([whole.sum(0), kept.sum(0), (kept * kept).sum(0), np.zeros(num_sources)])
        self._add_tokens(ratio(total, num_seen), num_seen > 0, is_neighbour)

    def _add_whole(self, values: npt.NDArray[Any], x: Float, is_neighbour: Bool) -> bool:
        """Add tokens (k, S, P), x (k, S * P), that were all observed: the same sums as of any, in fewer passes.

        False, and nothing is added or changed, where one was not.
        """
        num_samples = values.shape[2]
        if self.spec.kind == "counts" and is_missing(values, self.spec.rows().fill).any():
            return False
        shift = np.where(np.isnan(self.shift), values[0, :, 0], self.shift)
        centred = x - np.repeat(shift, num_samples)
        first = centred.sum(0)
        if not np.isfinite(first).all():  # any sample that is not finite makes its sum so
            return False
        self.shift = shift
        self._add_columns(centred, first, num_samples)
        mean = _totals(centred, num_samples)
        n, total, squares = float(len(x)), mean.sum(0), _products(mean, mean)
        _add_rows(self.moments["sums"], n, total, squares)
        mean /= num_samples
        population = mean.mean(1) + self.shift.mean()
        if np.isnan(self.population_shift):
            self.population_shift = float(population[0])
        population -= self.population_shift
        shared = np.einsum("i,ij->j", population, mean)
        level, power = population.sum(), (population**2).sum()
        _add_rows(self.pairs["population"], n, mean.sum(0), level, squares / num_samples**2, power, shared)
        self._add_neighbours(mean, is_neighbour)
        return True

    def _add_columns(self, x: Float, first: Float, num_samples: int) -> None:
        """Add samples x (k, S * P), all observed; `first` are the sums of their columns."""
        by_source, n = (self.spec.num_sources, num_samples), float(len(x))
        square = x * x
        second, third = square.sum(0), _products(square, x)
        sums = [table.reshape(by_source) for table in (first, second, third)]
        _add_rows(self.moments["samples"], n * num_samples, *map(_row_sums, sums))
        if num_samples > 1:
            product = np.append(_products(x[:, 1:], x[:, :-1]), 0.0).reshape(by_source)
            ends = [table[:, side] for table in sums[:2] for side in (slice(-1), slice(1, None))]
            # The last product of a source is with the first sample of the next source.
            _add_rows(self.pairs["sample_pairs"], n * (num_samples - 1), *map(_row_sums, (*ends, product[:, :-1])))

    def _add_neighbours(self, mean: Float, is_neighbour: Bool) -> None:
        """Pairs of tokens that follow each other, of means (k, S) that were all seen."""
        seen = np.ones((len(mean), mean.shape[1]), np.bool_)
        self._join(mean, seen, is_neighbour)
        x, y = mean[:-1], mean[1:]
        if not is_neighbour[1:].all():
            x, y = x[is_neighbour[1:]], y[is_neighbour[1:]]
        sums = (x.sum(0), y.sum(0), _products(x, x), _products(y, y), _products(x, y))
        _add_rows(self.pairs["token_pairs"], float(len(x)), *sums)

    def _join(self, mean: Float, seen: Bool, is_neighbour: Bool) -> None:
        """The pair of the block before's last token and this one's first."""
        if self.last is None:
            self.first = mean[0], seen[0]
        elif is_neighbour[0]:
            both = self.last[1] & seen[0]
            self.pairs["token_pairs"] += _pair_sums(self.last[0][None], mean[:1], both[None])
        self.last = mean[-1].copy(), seen[-1]

    def _set_shift(self, x: Float, seen: Bool) -> None:
        unset = np.isnan(self.shift)
        if not unset.any():
            return
        if seen[0, :, 0].all():  # the common case: the first sample of all is there
            self.shift[unset] = x[0, unset, 0]
            return
        of_source = seen.transpose(1, 0, 2).reshape(seen.shape[1], -1)  # (S, k * P)
        found = of_source.any(1) & unset
        values = x.transpose(1, 0, 2).reshape(len(of_source), -1)
        self.shift[found] = values[found, of_source[found].argmax(1)]

    def _add_samples(self, x: Float, seen: Bool, num_samples: int) -> None:
        by_source = (self.spec.num_sources, num_samples)
        square = x * x
        n = seen.sum(0).reshape(by_source).astype(np.float64)
        first, second = x.sum(0).reshape(by_source), square.sum(0).reshape(by_source)
        third = (square * x).sum(0).reshape(by_source)
        self.moments["samples"] += np.stack([n.sum(1), first.sum(1), second.sum(1), third.sum(1)])
        if num_samples == 1:
            return
        both = seen[:, 1:] & seen[:, :-1]
        tables = (both.astype(np.float64), *(np.where(both, table[:, side], 0.0) for table in (x, square)
                  for side in (slice(-1), slice(1, None))), x[:, 1:] * x[:, :-1])  # fmt: skip
        self.pairs["sample_pairs"] += np.stack([_by_source(table.sum(0), by_source) for table in tables])

    def _add_tokens(self, mean: Float, seen: Bool, is_neighbour: Bool) -> None:
        """Token means (k, S), about the shift, 0 where nothing was seen."""
        level = np.where(seen, mean + np.nan_to_num(self.shift), 0.0)
        population = ratio(level.sum(1), seen.sum(1).astype(np.float64))
        if np.isnan(self.population_shift) and seen.any():
            self.population_shift = float(population[seen.any(1).argmax()])
        others = np.broadcast_to((population - np.nan_to_num(self.population_shift))[:, None], mean.shape)
        self.pairs["population"] += _pair_sums(mean, others, seen)
        self._join(mean, seen, is_neighbour)
        both = seen[:-1] & seen[1:] & is_neighbour[1:, None]
        self.pairs["token_pairs"] += _pair_sums(mean[:-1], mean[1:], both)

    def part(self) -> Part:
        """Central moments, which can be merged with those about another shift."""
        shift = np.nan_to_num(self.shift)
        shifts = {"samples": shift, "sums": self.spec.samples_per_token * shift}
        part = {name: _central(sums, shifts[name]) for name, sums in self.moments.items()}
        level = np.full_like(shift, np.nan_to_num(self.population_shift))
        for name, sums in self.pairs.items():
            part[name] = _central_pairs(sums, shift, level if name == "population" else shift)
        for name, edge in (("first", self.first), ("last", self.last)):
            if edge is not None:
                part[name] = np.where(edge[1], edge[0] + shift, np.nan)
        return part


def _products(x: Float, y: Float) -> Float:
    """Sums (n,) of the products of the columns of x and y (k, n)."""
    result: Float = np.einsum("ij,ij->j", x, y)
    return result


def _add_rows(table: Float, *rows: Float | float) -> None:
    """Add each row (S,) to its row of a table; the table may have more."""
    for own, row in zip(table, rows, strict=False):
        own += row


def _row_sums(table: Float) -> Float:
    """Sums (n,) of the rows of a table (n, P); few columns are added one by one, which gives the same much sooner."""
    if table.shape[1] >= FEW_COLUMNS:
        return np.asarray(table.sum(1))
    total = table[:, 0].copy()
    for column in table.T[1:]:
        total += column
    return total


def _totals(x: Float, num_samples: int) -> Float:
    """Sums (k, S) over the samples of each token, of (k, S * P)."""
    total = x[:, ::num_samples].copy()
    for place in range(1, num_samples):
        total += x[:, place::num_samples]
    return total


def _by_source(columns: Float, by_source: tuple[int, int]) -> Float:
    """Sums (S,) of what follows inside a token, from products (S * P - 1,) of columns that stand side by side."""
    table = np.append(columns, 0.0).reshape(by_source)
    result: Float = table[:, :-1].sum(1)  # the last column of a source stands beside the next source
    return result


def _pair_sums(x: Float, y: Float, both: Bool) -> Float:
    x, y = np.where(both, x, 0.0), np.where(both, y, 0.0)
    return np.stack([both.sum(0), x.sum(0), y.sum(0), (x * x).sum(0), (y * y).sum(0), (x * y).sum(0)])


def _runs(wanted: Bool, limit: int) -> Iterator[tuple[int, int]]:
    """Stretches [a, b) of wanted tokens, at most `limit` long."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], wanted, [False]]).astype(np.int8)))
    for first, stop in zip(edges[::2], edges[1::2], strict=True):
        for start in range(int(first), int(stop), limit):
            yield start, min(start + limit, int(stop))


# ---------------------------------------------------------------- moments that merge (Chan, Golub & LeVeque 1983)


def _central(sums: Float, shift: Float) -> Float:
    n, s1, s2, s3 = sums
    mean = ratio(s1, n)
    return np.stack([n, mean + shift, s2 - n * mean**2, s3 - 3 * mean * s2 + 2 * n * mean**3])


def _central_pairs(sums: Float, shift_x: Float, shift_y: Float) -> Float:
    n, x, y, xx, yy, xy = sums
    mean_x, mean_y = ratio(x, n), ratio(y, n)
    squares = (xx - n * mean_x**2, yy - n * mean_y**2, xy - n * mean_x * mean_y)
    return np.stack([n, mean_x + shift_x, mean_y + shift_y, *squares])


def _merged(a: Float, b: Float) -> Float:
    """Moments (4, S) of both."""
    n = a[0] + b[0]
    share = ratio(b[0], n)
    step = np.where((a[0] > 0) & (b[0] > 0), b[1] - a[1], 0.0)
    mean = np.where(a[0] > 0, a[1] + step * share, b[1])
    second = a[2] + b[2] + step**2 * a[0] * share
    third = (
        a[3] + b[3] + step**3 * a[0] * share * ratio(a[0] - b[0], n) + 3 * step * ratio(a[0] * b[2] - b[0] * a[2], n)
    )
    return np.stack([n, mean, second, third])


def _merged_pairs(a: Float, b: Float) -> Float:
    """Moments of pairs (6, S) of both."""
    n = a[0] + b[0]
    share = ratio(b[0], n)
    is_both = (a[0] > 0) & (b[0] > 0)
    step_x, step_y = (np.where(is_both, b[row] - a[row], 0.0) for row in (1, 2))
    means = [np.where(a[0] > 0, a[row] + step * share, b[row]) for row, step in ((1, step_x), (2, step_y))]
    weight = a[0] * share
    squares = (step_x**2, step_y**2, step_x * step_y)
    return np.stack(
        [n, *means, *(a[row] + b[row] + square * weight for row, square in zip((3, 4, 5), squares, strict=True))]
    )


# ---------------------------------------------------------------- all shards


def statistics(spec: StreamSpec, tokens: TrainTokens, parts: Sequence[Mapping[str, Float]]) -> Statistics:
    """Mean, scale and features of a stream from the parts of its shards, in order."""
    size = spec.num_sources
    total: Part = {name: np.zeros((4, size)) for name in MOMENTS} | {name: np.zeros((6, size)) for name in PAIRS}
    before: Mapping[str, Float] | None = None
    for part in parts:
        for name in MOMENTS:
            total[name] = _merged(total[name], part[name]) if part else total[name]
        for name in PAIRS:
            total[name] = _merged_pairs(total[name], part[name]) if part else total[name]
        if "edges" not in part:
            continue
        first = int(part["edges"][0])
        if before is not None and tokens.is_neighbour[first] and int(before["edges"][1]) == first - 1:
            total["token_pairs"] = _merged_pairs(total["token_pairs"], _border(before["last"], part["first"]))
        before = part
    return _result(spec, total)


def _border(last: Float, first: Float) -> Float:
    """The pair of the last token of a shard and the first of the next, where both were seen."""
    seen = np.isfinite(last) & np.isfinite(first)
    zeros = np.zeros_like(last)
    return np.stack(
        [seen.astype(np.float64), np.where(seen, last, 0.0), np.where(seen, first, 0.0), zeros, zeros, zeros]
    )


def _result(spec: StreamSpec, total: Part) -> Statistics:
    n, mean, second, _ = total["samples"]
    seen, std = n > 0, np.sqrt(np.maximum(ratio(second, n), 0.0))
    features = np.where(seen[:, None], _features(spec, total, mean, std), 0.0)
    features = np.clip(np.nan_to_num(features), -FEATURE_LIMIT, FEATURE_LIMIT)
    is_counts = spec.kind == "counts"
    scale = np.maximum(std, COUNT_SCALE_FLOOR if is_counts else SCALE_FLOOR)
    mean = np.maximum(mean, MEAN_FLOOR) if is_counts else mean
    varies = seen & (is_counts | (std > 0))  # a trace that is constant here may move elsewhere: never divide by ~0
    mean, scale = np.where(seen, mean, 0.0), np.where(varies, scale, 1.0)
    return Statistics(mean.astype(np.float32), scale.astype(np.float32), features.astype(np.float32))


def _features(spec: StreamSpec, total: Part, mean: Float, std: Float) -> Float:
    is_counts = spec.kind == "counts"
    n, sum_mean, sum_second, _ = total["sums"]
    third = ratio(total["samples"][3], total["samples"][0])
    rate_hz = mean / (spec.sample_ns * 1e-9)
    correlation = {name: _correlation(total[name]) for name in PAIRS}
    by_name = {
        "log_rate": np.log(np.maximum(rate_hz, 0.0) + 0.01) if is_counts else np.zeros_like(mean),
        "cv": ratio(std, np.abs(mean)),
        "fano_token": ratio(ratio(sum_second, n), sum_mean) if is_counts else np.zeros_like(mean),
        "autocorr_sample": correlation["sample_pairs" if spec.samples_per_token > 1 else "token_pairs"],
        "autocorr_token": correlation["token_pairs"],
        "skewness": ratio(third, std**3),
        "population_coupling": correlation["population"],
    }
    return np.stack([by_name[name] for name in STREAM_FEATURES], axis=1)


def _correlation(pairs: Float) -> Float:
    """Pearson's, 0 where either does not vary."""
    n, _, _, xx, yy, xy = pairs
    return ratio(ratio(xy, n), np.sqrt(np.maximum(ratio(xx, n), 0.0) * np.maximum(ratio(yy, n), 0.0)))
