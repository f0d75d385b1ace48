"""What sources did around each time: against the plain loop over samples; what is not visible is not in it.

In: samples drawn at random, some not observed. Out: the same sums, means and gaps as by counting.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from train.model.surround_brainloom import (
    DECAYS_S,
    NUM_OWN,
    NUM_SUMS,
    OWN_SPANS,
    OWN_TRACE_SPANS,
    SPANS,
    Surround,
    surround,
)

HZ, NUM_TIMES, NUM_SOURCES = 50.0, 40, 3
IS_SPIKES = torch.tensor([[True, False, True], [False, False, True]])


def tokens(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values (B, N, P), which are observed, source (B, N), step of the grid (B, N, P); the last source has nothing."""
    chance = torch.Generator().manual_seed(seed)
    sizes = (2, 9, 4)
    observed = torch.rand(sizes, generator=chance) < 0.7
    values = torch.where(observed, torch.randn(sizes, generator=chance), 0.0)
    source = torch.randint(NUM_SOURCES - 1, sizes[:2], generator=chance)
    step = torch.stack([torch.randperm(NUM_TIMES, generator=chance)[:36].reshape(9, 4) for _ in range(2)])
    return values, observed, source, step


def found(seed: int = 0) -> Surround:
    values, observed, source, step = tokens(seed)
    return surround(values, observed, source, step / HZ, IS_SPIKES, NUM_TIMES, HZ)


def samples_of(batch: int, source: int, seed: int) -> dict[int, float]:
    """{step: value} of what is observed of a source."""
    values, observed, sources, step = (x[batch] for x in tokens(seed))
    own = observed & (sources == source)[:, None]
    return dict(zip(step[own].tolist(), values[own].tolist(), strict=True))


def bent(x: float) -> float:
    return math.copysign(math.log1p(abs(x)), x)


def expected(samples: dict[int, float], at: int, is_spikes: bool) -> tuple[list[float], list[float]]:
    """Sums and own numbers at a step, by counting."""
    last = max((step for step in samples if step <= at), default=None)
    after = min((step for step in samples if step >= at), default=None)

    def inside(first: int | None, stop: int | None) -> list[float]:
        return [] if first is None or stop is None else [x for step, x in samples.items() if first <= step < stop]

    def before(span: int) -> list[float]:
        return inside(None if last is None else last + 1 - span, None if last is None else last + 1)

    def behind(span: int) -> list[float]:
        return inside(after, None if after is None else after + span)

    past, future = [before(span) for span in SPANS], [behind(span) for span in SPANS]
    sums = [bent(sum(x) / math.sqrt(span)) for x, span in zip([*past, *future], 2 * SPANS, strict=True)]
    both = zip(past, future, SPANS, strict=True)
    sums += [bent((sum(a) + sum(b)) / math.sqrt(2 * span)) for a, b, span in both]
    own = []
    for side in (before, behind):
        means = [sum(side(span)) / max(1, len(side(span))) for span in (OWN_SPANS if is_spikes else OWN_TRACE_SPANS)]
        own += means if is_spikes else [means[0], *(b - a for a, b in pairwise(means))]
    own = [bent(x) for x in own] + [0.0 if is_spikes else x - bent(x) for x in own]
    gaps = [NUM_TIMES if last is None else at - last] * len(OWN_SPANS)
    gaps += [NUM_TIMES if after is None else after - at] * len(OWN_SPANS)
    gaps *= 2
    faded = [x * math.exp(-gap / HZ / decay) for decay in DECAYS_S for x, gap in zip(own, gaps, strict=True)]
    return sums, [*own, *faded]


def test_sums_and_fading_means_are_those_of_counting() -> None:
    around = found()
    assert around.sums.shape == (2, NUM_SOURCES, NUM_TIMES, NUM_SUMS) and around.own.shape[-1] == NUM_OWN
    for batch in range(2):
        for source in range(NUM_SOURCES):
            samples = samples_of(batch, source, 0)
            for at in range(NUM_TIMES):
                sums, own = expected(samples, at, bool(IS_SPIKES[batch, source]))
                torch.testing.assert_close(around.sums[batch, source, at], torch.tensor(sums), rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(around.own[batch, source, at], torch.tensor(own), rtol=1e-4, atol=1e-5)


def test_gaps_are_means_over_what_is_visible_at_all() -> None:
    around = found()
    assert around.seen.tolist() == [[True, True, False]] * 2, "the third source has no sample"
    gaps = around.mean_gaps(around.seen[..., None])[:, 0]
    for at in (0, 17, NUM_TIMES - 1):
        before = []
        for source in range(2):
            steps = [step for step in samples_of(0, source, 0) if step <= at]
            before.append(math.log1p(at - max(steps) if steps else min(at + 1, NUM_TIMES)))
        torch.testing.assert_close(gaps[0, at, 0], torch.tensor(sum(before) / 2))


def test_where_nothing_is_visible_all_is_zero_and_far() -> None:
    values, observed, source, step = tokens(0)
    around = surround(values * 0, observed & False, source, step / HZ, IS_SPIKES, NUM_TIMES, HZ)
    assert not around.sums.any() and not around.own.any()
    assert not around.seen.any()
    gaps = around.mean_gaps(around.seen[..., None])
    torch.testing.assert_close(gaps, torch.full_like(gaps, math.log1p(NUM_TIMES)))


def test_a_sample_at_the_edge_of_two_steps_is_in_the_later_one() -> None:
    """0.06 s x 50 Hz is 2.9999998 in single precision."""
    value, seen = torch.ones(1, 1, 1), torch.ones(1, 1, 1, dtype=torch.bool)
    source, time = torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1, 1), 0.06)
    around = surround(value, seen, source, time, torch.ones(1, 1, dtype=torch.bool), 10, HZ)
    torch.testing.assert_close(around.gaps[0, 0, :4, 1], torch.tensor([3.0, 2.0, 1.0, 0.0]).log1p())
