"""The clock of a stream: repairs of time stamps, regularity, and where tokens are cut.

In: time stamps as the file has them (float64 s on the session clock). Out: a Clock, and the findings of the audit.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prep.audit import LONGEST_SESSION_S, finding
from prep.plan import BrokenObject, Finding, PrepError
from prep.settings import FARTHEST_S, TOKEN_NS, to_ns

Seconds = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]

SHORTEST_PERIOD_S = 1e-6  # of a recording; a token of shorter ones would be larger than a worker's memory
GAP_PERIODS = 1.5  # a longer step than this is a gap
JITTER_PERIODS = 0.01  # a regular clock is within this of its line, inside every token
JITTER_SHARE = 0.25  # steps that scatter more than this about their median have no one period
STRAY_S, STRAY_STEPS, STRAY_SHARE = 10.0, 100, 0.01  # an outlier is this far from those around it; they are few
BACK_S, BACK_STEPS, BACK_SHARE = 1.0, 10, 0.01  # a reset clock goes back by as much, and rarely
WANDER_SAMPLES = 100
BLOCK_TOKENS = 2**14  # looked at at once


@dataclass(frozen=True, kw_only=True)
class Clock:
    """T samples in K tokens: token k holds the samples [bounds[k], bounds[k + 1])."""

    time_s: Seconds  # (T,) strictly increasing
    period_s: float  # of one sample; the median step where the clock is irregular
    samples_per_token: int  # P
    bounds: Index  # (K + 1,)
    num_gaps: int
    longest_gap_s: float

    @property
    def num_tokens(self) -> int:
        """K."""
        return len(self.bounds) - 1

    @property
    def start_ns(self) -> Index:
        """Time of the first sample of each token, (K,): the file's own time stamp, not a fitted one."""
        return to_ns(self.time_s[self.bounds[:-1]])

    @property
    def sample_ns(self) -> int:
        """Period of one sample."""
        return round(self.period_s * 1e9)

    @property
    def duration_ns(self) -> int:
        """What a full token lasts."""
        return round(self.samples_per_token * self.period_s * 1e9)


def rate_times(starting_time_s: float, rate_hz: float, num_samples: int) -> Seconds:
    """Times of a series that gives a rate only: starting_time + i / rate, (num_samples,)."""
    times: Seconds = starting_time_s + np.arange(num_samples, dtype=np.float64) / rate_hz
    return times


def clean_times(time_s: npt.ArrayLike, path: str) -> tuple[Seconds, Index | None, list[Finding]]:
    """Make time stamps finite and strictly increasing.

    Returns the kept times (T,), the row of the file that each came from (None: row i is sample i), and the repairs.
    """
    times = np.asarray(time_s, dtype=np.float64)
    if _is_clean(times):
        return times, None, []
    rows = np.arange(len(times), dtype=np.int64)
    findings: list[Finding] = []
    for repair in (_drop_non_finite, _drop_outliers, _keep_longest_piece, _sort, _drop_duplicates):
        rows, found = repair(times, rows, path)
        findings.extend(found)
    return times[rows], rows if findings else None, findings


def _is_clean(times: Seconds) -> bool:
    with np.errstate(invalid="ignore"):  # inf - inf
        steps = np.diff(times)
    return bool(len(steps) and steps.min() > 0 and times[-1] - times[0] <= LONGEST_SESSION_S)  # False for NaN


def _drop_non_finite(times: Seconds, rows: Index, path: str) -> tuple[Index, list[Finding]]:
    kept = rows[np.isfinite(times[rows])]
    if len(kept) == 0:
        raise PrepError(f"none of its {len(times)} time stamps is a number")
    dropped = len(rows) - len(kept)
    if dropped == 0:
        return rows, []
    message = f"{dropped} of {len(times)} time stamps are not numbers; their samples are dropped"
    return kept, [finding("non-finite-time", path, message, num_dropped=float(dropped))]


def _drop_outliers(times: Seconds, rows: Index, path: str) -> tuple[Index, list[Finding]]:
    """Drop what is 30 days from the middle stamp, and single stamps far from the five around them."""
    values = times[rows]
    middle_s = np.partition(values, len(values) // 2)[len(values) // 2]
    is_far = np.abs(values - middle_s) > LONGEST_SESSION_S
    near = np.flatnonzero(~is_far)
    is_far[near[_strays(values[near])]] = True
    dropped = values[is_far]
    if len(dropped) == 0:
        return rows, []
    worst_s = float(dropped[np.abs(dropped - middle_s).argmax()])
    message = f"{len(dropped)} time stamps are far from the others (such as {worst_s:.6g} s); their samples are dropped"
    numbers = {"num_dropped": float(len(dropped)), "worst_s": worst_s}
    return rows[~is_far], [finding("outlier-time", path, message, **numbers)]


def _strays(values: Seconds) -> Index:
    """Places of stamps (T,) far from the median of the five around them; none where they are more than exceptions.

    Of increasing stamps the third of five is the median, so a gap makes no outlier, and only stamps that are near a
    step back need to be looked at.
    """
    steps = np.diff(values)
    if len(values) < 5 or steps.min() > 0:
        return np.zeros(0, np.int64)
    usual_s = float(np.median(np.abs(steps)))
    near_back = np.flatnonzero(steps <= 0)[:, None] + np.arange(-1, 3)
    place = np.unique(np.clip(near_back, 0, len(values) - 1))
    around = values[np.clip(place[:, None] + np.arange(-2, 3), 0, len(values) - 1)]
    is_stray = np.abs(values[place] - np.median(around, axis=1)) > max(STRAY_S, STRAY_STEPS * usual_s)
    return place[is_stray] if is_stray.sum() <= STRAY_SHARE * len(values) else place[:0]


def _keep_longest_piece(times: Seconds, rows: Index, path: str) -> tuple[Index, list[Finding]]:
    """Where time goes back rarely and by a lot, the clock was reset, and no rule puts the pieces on one clock.

    Pieces that follow each other without a gap once sorted are left to be sorted: they were written in another order.
    """
    values = times[rows]
    steps = np.diff(values)
    forward = steps[steps > 0]
    if len(forward) == 0:
        return rows, []
    usual_s = float(np.median(forward))
    (back,) = np.nonzero(steps < -max(BACK_S, BACK_STEPS * usual_s))
    if not 0 < len(back) <= max(1, BACK_SHARE * len(values)):
        return rows, []
    pieces = sorted(np.split(rows, back + 1), key=lambda piece: float(times[piece[0]]))
    joins = [float(times[after[0]] - times[before[-1]]) for before, after in itertools.pairwise(pieces)]
    if all(0 < join <= BACK_STEPS * usual_s for join in joins):
        return rows, []
    longest = max(pieces, key=len)
    back_s = -float(steps[back].min())
    message = (
        f"time goes back {len(back)} times, by up to {back_s:.6g} s: the clock was reset; "
        f"the longest piece is kept, {len(longest):,} of {len(rows):,} samples"
    )
    numbers = {"num_jumps": float(len(back)), "jump_s": back_s, "num_dropped": float(len(rows) - len(longest))}
    return longest, [finding("jumps", path, message, **numbers)]


def _sort(times: Seconds, rows: Index, path: str) -> tuple[Index, list[Finding]]:
    backwards = int((np.diff(times[rows]) < 0).sum())
    if backwards == 0:
        return rows, []
    message = f"time goes backwards {backwards} times; samples are sorted by time"
    order = np.argsort(times[rows], kind="stable")
    return rows[order], [finding("unsorted", path, message, num_backwards=float(backwards))]


def _drop_duplicates(times: Seconds, rows: Index, path: str) -> tuple[Index, list[Finding]]:
    is_new = np.diff(times[rows], prepend=-np.inf) > 0
    dropped = len(rows) - int(is_new.sum())
    if dropped == 0:
        return rows, []
    message = f"{dropped} time stamps occur twice; the first sample of each is kept"
    return rows[is_new], [finding("duplicate-time", path, message, num_dropped=float(dropped))]


def regularity(time_s: Seconds, rate_hz: float | None = None) -> Clock:
    """Find period and gaps of strictly increasing times (T >= 2,), and cut them into tokens of about 100 ms.

    A gap ends its token early. Where a sample lies further than 1 % of the period from its place in its token the
    clock is irregular: P = 1, and every time stamp is kept.
    """
    steps = np.diff(time_s)
    gaps = steps > GAP_PERIODS * np.median(steps)
    # The mean step of the regular runs is their end-to-end period: rounding of single time stamps cancels in it.
    period_s = 1 / rate_hz if rate_hz else float(steps[~gaps].mean())
    if not SHORTEST_PERIOD_S <= period_s <= LONGEST_SESSION_S:
        raise BrokenObject(f"its samples are {period_s:.3g} s apart; expected {SHORTEST_PERIOD_S:g} s to 30 days.")
    if max(abs(time_s[0]), abs(time_s[-1])) > FARTHEST_S:
        raise BrokenObject(f"its times are {time_s[0]:.3g} to {time_s[-1]:.3g} s; nanoseconds hold {FARTHEST_S:.3g} s.")
    num_samples = max(1, round(TOKEN_NS / (period_s * 1e9)))
    bounds, deviation_s = _cut(time_s, gaps, period_s, num_samples)
    if deviation_s > JITTER_PERIODS * period_s + 2 * np.spacing(np.abs(time_s).max()):
        num_samples, bounds = 1, np.arange(len(time_s) + 1, dtype=np.int64)
        period_s = float(np.median(steps))
    return Clock(
        time_s=time_s,
        period_s=period_s,
        samples_per_token=num_samples,
        bounds=bounds,
        num_gaps=int(gaps.sum()),
        longest_gap_s=float(steps.max()),
    )


def _cut(time_s: Seconds, gaps: npt.NDArray[np.bool_], period_s: float, num_samples: int) -> tuple[Index, float]:
    """Bounds of the tokens (K + 1,), and how far a sample lies from its place in its token, at most."""
    runs = np.concatenate([[0], np.flatnonzero(gaps) + 1, [len(time_s)]])
    num_tokens = -(-np.diff(runs) // num_samples)  # of each run
    token = np.arange(num_tokens.sum()) - np.repeat(np.cumsum(num_tokens) - num_tokens, num_tokens)
    bounds = np.append(np.repeat(runs[:-1], num_tokens) + token * num_samples, runs[-1])
    deviation_s = 0.0
    for first in range(0, len(bounds) - 1, BLOCK_TOKENS):
        own = bounds[first : first + BLOCK_TOKENS + 1]
        sample, length = np.arange(own[0], own[-1]), np.diff(own)
        start = np.repeat(own[:-1], length)
        away_s = time_s[own[0] : own[-1]] - time_s[start] - (sample - start) * period_s
        deviation_s = max(deviation_s, float(np.abs(away_s).max()))
    return bounds, deviation_s


def clock_findings(clock: Clock, path: str) -> list[Finding]:
    """What the audit has to say about a clean clock: gaps, irregular steps, a rate that wanders."""
    findings = []
    numbers = _measure(clock)
    if clock.num_gaps and clock.samples_per_token > 1:
        message = f"{clock.num_gaps} gaps, the longest {clock.longest_gap_s:.3g} s; tokens end at them"
        gaps = {"num_gaps": float(clock.num_gaps), "gap_s": clock.longest_gap_s}
        findings.append(finding("gaps", path, message, **gaps, **numbers))
    if clock.samples_per_token == 1 and clock.sample_ns * 2 <= TOKEN_NS:
        has_period = numbers["jitter_ms"] <= JITTER_SHARE * clock.period_s * 1e3
        median = f"steps differ (median {clock.period_s * 1e3:.4g} ms"
        message = f"{median}, jitter {numbers['jitter_ms']:.3g} ms); every time stamp is kept as its own token"
        findings.append(finding("jitter" if has_period else "irregular", path, message, **numbers))
    if clock.num_gaps == 0 and len(clock.time_s) >= WANDER_SAMPLES:
        findings += _wander(clock, path)
    return findings


def _measure(clock: Clock) -> dict[str, float]:
    """Rate, and the standard deviation of the steps without gaps."""
    steps = np.diff(clock.time_s)
    steady = steps[steps <= GAP_PERIODS * np.median(steps)]
    return {"rate_hz": 1 / clock.period_s, "jitter_ms": 1e3 * float(steady.std())}


def _wander(clock: Clock, path: str) -> list[Finding]:
    """Whether time stamps stray by more than a sample from a straight line through the first and the last."""
    place = np.linspace(0, len(clock.time_s) - 1, 21).astype(np.int64)
    since_s = clock.time_s[place] - clock.time_s[0]
    residual_s = float(np.abs(since_s - place * since_s[-1] / place[-1]).max())
    if residual_s <= clock.period_s:
        return []
    slopes = np.diff(since_s) / np.diff(place)
    drift_ppm = 1e6 * float(slopes[-4:].mean() / slopes[:4].mean() - 1)
    message = f"its rate wanders: time stamps stray up to {residual_s * 1e3:.4g} ms from a straight line"
    return [finding("drift", path, message, residual_ms=residual_s * 1e3, drift_ppm=drift_ppm)]
