"""The clock of a stream: repairs of time stamps, regularity, and where tokens are cut.

In: time stamps as the file has them (float64 s on the session clock). Out: a Clock, and the findings of the audit.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prep.plan import Finding, PrepError
from prep.settings import TOKEN_NS, to_ns

Seconds = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]

GAP_PERIODS = 1.5  # a longer step than this is a gap
JITTER_PERIODS = 0.01  # a regular clock is within this of its line, inside every token


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
    findings = []
    rows = np.flatnonzero(np.isfinite(times)).astype(np.int64)
    if len(rows) == 0:
        raise PrepError(f"none of its {len(times)} time stamps is a number")
    if len(rows) < len(times):
        message = f"{len(times) - len(rows)} of {len(times)} time stamps are not numbers; their samples are dropped"
        findings.append(Finding(code="non-finite-time", path=path, action="repaired", message=message))
    steps = np.diff(times[rows])
    if (steps < 0).any():
        message = f"time goes backwards {int((steps < 0).sum())} times; samples are sorted by time"
        findings.append(Finding(code="unsorted", path=path, action="repaired", message=message))
        rows = rows[np.argsort(times[rows], kind="stable")]
        steps = np.diff(times[rows])
    if (steps == 0).any():
        message = f"{int((steps == 0).sum())} time stamps occur twice; the first sample of each is kept"
        findings.append(Finding(code="duplicate-time", path=path, action="repaired", message=message))
        rows = rows[np.concatenate([[True], steps > 0])]
    return times[rows], rows if findings else None, findings


def regularity(time_s: Seconds, rate_hz: float | None = None) -> Clock:
    """Find period and gaps of strictly increasing times (T >= 2,), and cut them into tokens of about 100 ms.

    A gap ends its token early. Where a sample lies further than 1 % of the period from its place in its token the
    clock is irregular: P = 1, and every time stamp is kept.
    """
    steps = np.diff(time_s)
    gaps = steps > GAP_PERIODS * np.median(steps)
    # The mean step of the regular runs is their end-to-end period: rounding of single time stamps cancels in it.
    period_s = 1 / rate_hz if rate_hz else float(steps[~gaps].mean())
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
    sample = np.arange(len(time_s), dtype=np.int64)
    run_start = np.maximum.accumulate(np.where(np.concatenate([[True], gaps]), sample, 0))
    place = (sample - run_start) % num_samples
    deviation_s = np.abs(time_s - time_s[sample - place] - place * period_s).max()
    return np.append(sample[place == 0], len(time_s)), float(deviation_s)


def clock_findings(clock: Clock, path: str) -> list[Finding]:
    """What the audit has to say about a clean clock: gaps, irregular steps."""
    findings = []
    if clock.num_gaps and clock.samples_per_token > 1:
        message = f"{clock.num_gaps} gaps, the longest {clock.longest_gap_s:.3g} s; tokens end at them"
        findings.append(Finding(code="gaps", path=path, action="noted", message=message))
    if clock.samples_per_token == 1 and clock.sample_ns * 2 <= TOKEN_NS:
        message = f"steps differ (median {clock.period_s * 1e3:.4g} ms); every time stamp is kept as its own token"
        findings.append(Finding(code="irregular", path=path, action="noted", message=message))
    return findings
