"""The rules of the audit: every code, what it means and what is done about it; and audits of numbers alone.

In: times (float64 s on the session clock), spans of streams. Out: Findings, whose action is the rule of their code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from prep.plan import Finding

Seconds = npt.NDArray[np.float64]
Span = tuple[float, float]  # first and last time in s

LONGEST_SESSION_S = 30 * 86_400.0  # no clock of a session runs longer
RATE_TOLERANCE = 0.01  # a stated rate is nominal: 30 Hz of a camera that runs at 29.97 Hz is no finding
FEW_SAMPLES = 10  # data and time stamps may differ by as many, and by no more than 1 %
MS_RATIO = (500.0, 2_000.0)  # a span in ms is this many times as long as the others, in s
SHORTEST_S = 30.0  # less than this is no recording that tells how long the others should be
MS_STEP = 0.5  # a step in ms is at least this, up to 2 kHz; in s, that would be 2 Hz or slower
OUTSIDE_S = 60.0  # recordings start before the task and end after it
OUTSIDE_SHARE = 0.01

Numbers = float | list[float]
ACTIONS: dict[str, str] = {"repair": "repaired", "note": "noted", "refuse": "refused"}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a code of the audit means, and what is always done about it."""

    means: str
    rule: Literal["repair", "note", "refuse"]
    done: str


def _rule(means: str, rule: Literal["repair", "note", "refuse"], done: str) -> Rule:
    return Rule(means=means, rule=rule, done=done)


RULES: dict[str, Rule] = {
    # ---- one clock
    "non-finite-time": _rule("time stamps are NaN or infinite", "repair", "their samples are dropped"),
    "outlier-time": _rule("time stamps are far from all others around them", "repair", "their samples are dropped"),
    "jumps": _rule("time goes back by a lot: the clock was reset", "repair", "the longest piece is kept"),
    "unsorted": _rule("time goes back a little, or often", "repair", "samples are sorted by time"),
    "duplicate-time": _rule("time stamps occur twice", "repair", "the first sample of each is kept"),
    "placeholder-time": _rule("-1 among positive times stands for none", "repair", "they are dropped"),
    "milliseconds": _rule("times are milliseconds, not seconds", "repair", "they are divided by 1000"),
    "length-mismatch": _rule(
        "data and time stamps differ in length", "repair", "by a few: both are cut to the shorter; else refused"
    ),
    "rate-mismatch": _rule("the stated rate is not that of the time stamps", "note", "the time stamps are taken"),
    "coarse-time": _rule("the type of the time stamps rounds them", "note", "they are taken; write them as float64"),
    "gaps": _rule("steps are much longer than the period", "note", "tokens end at them; nothing is filled in"),
    "jitter": _rule("steps scatter about one period", "note", "every time stamp is kept as its own token"),
    "irregular": _rule("there is no one period", "note", "every time stamp is kept as its own token"),
    "drift": _rule("the rate wanders within the recording", "note", "the time stamps are taken"),
    # ---- clocks against each other
    "no-overlap": _rule("a stream overlaps no other stream in time", "note", "its times are kept"),
    "spikes-alone": _rule("spikes before or after all that else was recorded", "note", "they are kept"),
    "spikes-outside-session": _rule("spikes farther off than the session is long", "repair", "they are dropped"),
    "spike-times-ms": _rule("spike times are milliseconds, not seconds", "repair", "they are divided by 1000"),
    "joined-clock": _rule("files of one session may not share a clock", "note", "see the message"),
    "clock-drift": _rule(
        "one train of pulses stands in the file with two offsets or speeds", "note", "times are kept; `sync` maps them"
    ),
    "clock-mapped": _rule("times were on another clock", "repair", "they are mapped by the pulses of `sync`"),
    "clock-residuals": _rule("how well the pulses of `sync` agree", "note", "the map goes through each pulse"),
    "extrapolated": _rule(
        "times lie before the first or after the last pulse", "note", "the map goes on at the mean slope of its end"
    ),
    # ---- data
    "wrong-axis": _rule("time is the second axis of the data", "repair", "the data are transposed"),
    "ambiguous-axis": _rule("either axis could be time", "note", "the first is taken"),
    "non-finite-data": _rule("samples are NaN or infinite", "note", "they are missing"),
    "frame-index": _rule("an index lies beyond its frames", "repair", "no frame was shown there"),
    "duplicate-spikes": _rule("a unit has two spikes at one time", "note", "both are counted"),
    "spikes-outside-observed": _rule("spikes while their unit was not observed", "repair", "they are not counted"),
    "saturated": _rule("more than 254 spikes in one bin", "repair", "254 are counted"),
    "unowned": _rule("spikes belong to no unit", "repair", "they are dropped"),
    "frames-mismatch": _rule("frames and time stamps differ in number", "repair", "the shorter counts"),
    "conversion": _rule("conversion or offset are not numbers", "repair", "they are taken as 1 and 0"),
    "roi-reference": _rule("the series does not say which ROIs its columns are", "note", "see the message"),
    "unmatched-end": _rule("an end without a beginning", "repair", "it is dropped"),
    "relative-times": _rule("times of a trial count from its start", "note", "see the message"),
    "stimulus-units": _rule("the physical unit of a stimulus is not certain", "note", "see the message"),
    "stimulus-table": _rule("a table says what was shown in no known words", "note", "its times are kept"),
    "no-pixels": _rule("pictures that a table names are not at hand", "note", "its other columns are read"),
    "frames-from-one": _rule("frames are counted from one", "repair", "they are read from zero"),
    "maybe-milliseconds": _rule("spike times may be milliseconds", "note", "they are read as seconds"),
    "keep-units": _rule("the recipe leaves units out", "note", "they are not in the store"),
    "obs-intervals-backward": _rule("times of observation end before they begin", "repair", "they are dropped"),
    "obs-intervals": _rule("units were observed for a part of the time", "note", "outside it they are missing"),
    "scan-offset": _rule("offsets of ROIs within a frame are not numbers", "note", "all are taken as 0"),
    "maybe-signal": _rule("a smooth signal on an irregular clock", "note", "they are read as events"),
    "same-data": _rule("two streams hold the same numbers", "note", "both are read; see the message"),
    "maybe-angle": _rule("the unit is an angle's, the values are not", "note", "it is taken as a number"),
    # ---- the file and the recipe
    "broken-object": _rule("an object contradicts itself or cannot be read", "refuse", "it is left out"),
    "recipe-unmatched": _rule("the recipe names what the file does not have", "note", "the name is ignored"),
    "unusable-file": _rule("a file of a joined session cannot be used", "refuse", "the others go on"),
    "joined-twice": _rule("joined files hold the same object", "repair", "the first is taken"),
    "short-session": _rule("the session is too short for a split", "note", "it has none"),
}


def finding(code: str, path: str, message: str, **numbers: Numbers) -> Finding:
    """A row of the audit; its action is the rule of its code."""
    return Finding(code=code, path=path, action=ACTIONS[RULES[code].rule], message=message, numbers=numbers)


# ---------------------------------------------------------------- one clock


def few(num_samples: int, num_stamps: int) -> bool:
    """Whether data and time stamps differ by so little that the shorter counts: 10 at most, and 1 % (or one)."""
    return abs(num_samples - num_stamps) <= min(FEW_SAMPLES, max(1, 0.01 * num_stamps))


def length_finding(path: str, num_samples: int, num_stamps: int) -> Finding:
    """Data and time stamps differ by a few."""
    kept = min(num_samples, num_stamps)
    message = f"{num_samples:,} samples but {num_stamps:,} time stamps; the first {kept:,} of both are taken"
    return finding("length-mismatch", path, message, num_samples=float(num_samples), num_stamps=float(num_stamps))


def rate_finding(path: str, rate_hz: float, stated_hz: float | None, told_by: str) -> list[Finding]:
    """Whether a rate that the file states elsewhere is the clock's."""
    if not stated_hz or abs(rate_hz / stated_hz - 1) <= RATE_TOLERANCE:
        return []
    message = f"{told_by} {stated_hz:.6g} Hz, but its clock runs at {rate_hz:.6g} Hz; the clock is taken"
    return [finding("rate-mismatch", path, message, rate_hz=rate_hz, stated_hz=stated_hz)]


def in_milliseconds(
    time_s: Seconds, says_ms: bool = False, stated_hz: float | None = None, others: Sequence[Span] = ()
) -> str:
    """Why finite, increasing times (T,) are evidently milliseconds; "" where they are not.

    By their own unit, by the stated rate, or by spans of others (s): the times take 1000 times as long as the longest
    of them, and divided by 1000 they lie among them.
    """
    if says_ms:
        return "their unit says so"
    if len(time_s) < 2:
        return ""
    step, length = float(np.median(np.diff(time_s))), float(time_s[-1] - time_s[0])
    if stated_hz and 0.9 < step * stated_hz / 1000 < 1.1:
        return f"the median step is {step:.4g}, 1000 times that of {stated_hz:.4g} Hz"
    if not others or step < MS_STEP:
        return ""
    usual = max(last - first for first, last in others)
    first, last = min(span[0] for span in others), max(span[1] for span in others)
    is_among = time_s[0] / 1000 <= last and time_s[-1] / 1000 >= first
    if usual >= SHORTEST_S and MS_RATIO[0] < length / usual < MS_RATIO[1] and is_among:
        return f"they take {length:.4g}, what is around them {usual:.4g} s"
    return ""


def may_be_milliseconds(time_s: Seconds) -> bool:
    """Whether it is worth looking at the spans of others: cheap, and false for nearly all clocks."""
    return len(time_s) >= 2 and float(np.median(np.diff(time_s))) >= MS_STEP


# ---------------------------------------------------------------- clocks against each other


def overlap_findings(spans: Mapping[str, Span]) -> list[Finding]:
    """Streams (path: span) that overlap no other stream in time."""
    findings = []
    for path, (first, last) in spans.items():
        others = [span for name, span in spans.items() if name != path]
        if others and not any(first <= stop and start <= last for start, stop in others):
            away_s = min(max(start - last, first - stop) for start, stop in others)
            message = f"it runs from {first:.6g} s to {last:.6g} s, {away_s:.4g} s away from all other streams"
            findings.append(finding("no-overlap", path, message, first_s=first, last_s=last, away_s=away_s))
    return findings


def outside_finding(path: str, num_spikes: int, num_outside: int, session: Span) -> list[Finding]:
    """Spikes far outside of what else was recorded, where they are more than 1 %."""
    if num_spikes == 0 or num_outside <= OUTSIDE_SHARE * num_spikes:
        return []
    share = num_outside / num_spikes
    message = (
        f"{share:.1%} of the spikes lie more than {OUTSIDE_S:.0f} s outside of all other streams and tables "
        f"({session[0]:.6g} s to {session[1]:.6g} s)"
    )
    return [finding("spikes-alone", path, message, num_outside=float(num_outside), outside_share=share)]


def missing_finding(path: str, num_missing: int, num_samples: int, is_whole: bool) -> list[Finding]:
    """Samples that are not numbers; `is_whole` is false where the share is an estimate from evenly spaced blocks."""
    if num_missing == 0:
        return []
    share = num_missing / num_samples
    about = "" if is_whole else "about "
    message = f"{about}{share:.3%} of its samples are not numbers; they are missing"
    return [finding("non-finite-data", path, message, missing_share=share)]
