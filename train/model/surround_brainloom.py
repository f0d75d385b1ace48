"""What each source did around each time of the readout grid, the short way: sums that no latent has to carry.

In: visible samples with their sources and times. Out: for each source and time, sums over spans that end with its last
visible sample, and over spans that begin with its next one; and how far away these samples are.

The regressions of the field (ridge, Poisson GLM) read nothing else, and on short recordings they are hard to beat: what
a population did in the last tens of milliseconds is a few numbers of each unit. Here they are bent unit by unit, for
the rates of two units are near powers of each other, and only then summed over the population. Spans hang on what is
visible, so that a forecast sees the same past from any time to come.

Shapes: B batch, N visible tokens, P samples per token, S sources, G times of the readout grid, J spans.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SPANS = (1, 3, 8, 20, 60)  # steps of the readout grid: 20 ms to 1.2 s at 50 Hz
NUM_SUMS = 3 * len(SPANS)  # before, after, both
OWN_SPANS = (1, 3, 8, 60)  # what a source of counts says of itself
OWN_TRACE_SPANS = (1, 5, 20, 75)  # and any other source: as close to every single sample as four spans come
DECAYS_S = (0.1, 0.5)  # how what a source says of itself fades with its distance; and not at all
NUM_OWN = 2 * 2 * len(OWN_SPANS) * (1 + len(DECAYS_S))  # of past and future, bent and what bending takes away
EDGE = 1e-3  # of a step: a sample at the edge of two steps is in the later one, whatever is rounded


@dataclass(frozen=True)
class Surround:
    """Of each source at each time of the grid.

    Attributes:
        sums: log(1 + |x|), with its sign, of sums over the root of their span (B, S, G, NUM_SUMS); zero where there is
            nothing.
        own: of the same samples, fading with their distance (B, S, G, NUM_OWN).
        gaps: log(1 + steps) to the last and the next visible sample (B, S, G, 2).
        seen: which sources are visible at all (B, S).
    """

    sums: Tensor
    own: Tensor
    gaps: Tensor
    seen: Tensor

    def mean_gaps(self, kept_BSV: Tensor) -> Tensor:
        """Means (B, V, G, 2) of `gaps` over some sources (bool); of a window's length where there are none."""
        num_kept_BV = kept_BSV.sum(1)[..., None, None]
        mean = torch.einsum("bsgt,bsv->bvgt", self.gaps, kept_BSV.to(self.gaps.dtype)) / num_kept_BV.clamp(min=1)
        return torch.where(num_kept_BV > 0, mean, mean.new_tensor(self.gaps.shape[2]).log1p())


def surround(
    values_BNP: Tensor,
    observed_BNP: Tensor,
    source_BN: Tensor,
    time_BNP: Tensor,
    is_counted_BS: Tensor,
    num_times: int,
    readout_hz: float,
) -> Surround:
    """Of standardised samples, zero where they are not observed, at `time_BNP` seconds from the window's start.

    Nothing of it is learned, and what comes in has no gradient.
    """
    num_sources = is_counted_BS.shape[1]
    step = (time_BNP * readout_hz + EDGE).floor().long().clamp(0, num_times - 1)
    place = (source_BN[..., None] * num_times + step).flatten(1)

    def on_grid(x_BNP: Tensor) -> Tensor:
        """Sums (B, S, G) of the samples in each step."""
        empty = x_BNP.new_zeros(len(x_BNP), num_sources * num_times, dtype=torch.float32)
        total: Tensor = empty.scatter_add(1, place, x_BNP.flatten(1).float()).unflatten(1, (num_sources, num_times))
        return total

    total, count = on_grid(values_BNP), on_grid(observed_BNP)
    steps = torch.arange(num_times, device=count.device)
    last = torch.where(count > 0, steps, -1).cummax(-1).values
    after = torch.where(count > 0, steps, num_times).flip(-1).cummin(-1).values.flip(-1)

    def spans(x_BSG: Tensor, lengths: Sequence[int | Tensor]) -> tuple[Tensor, Tensor]:
        """Sums (B, S, G, J) over the spans that end with `last`, and over those that begin with `after`.

        Each of the J lengths is the same for all sources, or their own (B, S, 1).
        """
        until = F.pad(x_BSG.cumsum(-1), (1, 0))  # until[g]: everything before step g
        ends, begins = until.gather(-1, last + 1), until.gather(-1, after)
        past = [ends - until.gather(-1, (last + 1 - length).clamp(min=0)) for length in lengths]
        future = [until.gather(-1, (after + length).clamp(max=num_times)) - begins for length in lengths]
        return torch.stack(past, -1), torch.stack(future, -1)

    past, future = spans(total, SPANS)
    length = total.new_tensor(SPANS)
    sums = bent(torch.cat([past / length.sqrt(), future / length.sqrt(), (past + future) / (2 * length).sqrt()], -1))

    seen = (count > 0).any(-1)
    gap = torch.stack([steps - last, after - steps], -1).clamp(max=num_times).float()

    own_length = torch.where(is_counted_BS[..., None], gap.new_tensor(OWN_SPANS), gap.new_tensor(OWN_TRACE_SPANS))
    own_lengths = own_length.long()[:, :, None].unbind(-1)
    means = torch.cat(spans(total, own_lengths), -1) / torch.cat(spans(count, own_lengths), -1).clamp(min=1)
    is_counted = is_counted_BS[..., None, None]
    level = torch.where(is_counted, means, changes(means))
    low = bent(level)
    own = torch.cat([low, torch.where(is_counted, 0.0, level - low)], -1)  # what bending takes away, of no count
    fade = torch.exp(-gap[..., None, :] / readout_hz / gap.new_tensor(DECAYS_S)[:, None])  # (B, S, G, decays, 2)
    fade = torch.cat([torch.ones_like(fade[..., :1, :]), fade], -2).repeat_interleave(len(OWN_SPANS), -1)
    own = (own[..., None, :] * torch.cat([fade, fade], -1)).flatten(-2)
    dtype = values_BNP.dtype
    return Surround(sums.to(dtype), own.to(dtype), gap.log1p(), seen)


def changes(means: Tensor) -> Tensor:
    """Of nested means (…, 2 J), past and future: the shortest, and how far each longer one is from the one before.

    Nested means are much the same number, and Adam is slow to tell them apart (CONTRIBUTING.md, 2026-11-29).
    """
    sides = means.unflatten(-1, (2, -1))
    return torch.cat([sides[..., :1], sides.diff(dim=-1)], -1).flatten(-2)


def bent(x: Tensor) -> Tensor:
    """log(1 + |x|) with the sign of x; asinh, which is much the same, takes twenty times as long on a CPU."""
    return torch.copysign(x.abs().log1p(), x)
