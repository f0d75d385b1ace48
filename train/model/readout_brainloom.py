"""How sources read features: each in its own way, at any time.

In: features on a regular grid of times, identities, traits. Out: numbers for each source's likelihood, at the times
asked for.

Shapes: B batch, S sources, G times of the readout grid, R numbers of a readout, D hidden_size,
E unit_embed_size, Q queries, P samples.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention_brainloom import BrainloomRMSNorm
from .configuration_brainloom import BrainloomConfig
from .likelihoods_brainloom import bounded
from .surround_brainloom import NUM_OWN

GAIN_LIMIT = 3.0  # of the log of a rate's gain: a factor of 0.05 to 20
DECAY_S, LOG_DECAY_LIMIT = 0.5, 2.0  # of an indicator, at the start; 0.07 to 3.7 s
NUM_MOMENTS = 2  # of what a source says of itself: location and log scale
NUM_FEATURES = 3  # kinds of them: of the latents, of the screen, of the population
QUIET = 0.3  # share of its usual size at which a quiet map starts


class BrainloomZeroLinear(nn.Linear):
    """A linear map that starts at zero: a residual branch that is silent, a head whose prediction is its null."""


class BrainloomQuietLinear(nn.Linear):
    """A linear map that starts small: a head near its null, through which gradients reach what it reads at once."""


class BrainloomReadout(nn.Module):
    """Every source reads the same features in its own way.

    Its weights on what the latents say, on what is on the screen, and on what the population does are each made of a
    part of its traits. Made of the identity, they would have to share its few numbers, and the loudest would have them
    all: Adam moves each number by what most of its gradient comes from (CONTRIBUTING.md, 2026-11-30).
    """

    def __init__(self, config: BrainloomConfig) -> None:
        super().__init__()
        size, self.num_readouts = config.hidden_size, config.num_readouts
        self.weight_projs = nn.ModuleList(
            BrainloomQuietLinear(part, self.num_readouts * size, bias=False) for part in trait_parts(config)
        )
        self.source_layernorm = BrainloomRMSNorm(size, config.rms_norm_eps)
        self.bias_proj = BrainloomZeroLinear(size, self.num_readouts)
        self.self_proj = BrainloomZeroLinear(size, NUM_MOMENTS * NUM_OWN, bias=False)
        self.decay_proj = BrainloomZeroLinear(size, 1) if config.likelihoods["traces"] == "calcium" else None
        self.step_s = 1 / config.readout_hz

    def forward(
        self,
        features_BGD: Tensor,
        identity_BSD: Tensor,
        traits_BSE: Tensor,
        leaks_BS: Tensor,
        own_BSGO: Tensor | None = None,
        left_out_BFGD: Tensor | None = None,
        fold_BS: Tensor | None = None,
    ) -> Tensor:
        """Readouts (B, S, G, R): of each source at each time of the grid, R numbers for its likelihood.

        Where traces are calcium, the last number of the sources that leak is a gain of their rate, whose growth is
        integrated over time with a decay of their own. A source that has a fold reads what the population says without
        that fold, and nothing else: not what the latents say, which have read the source itself, nor its own past.
        """
        source_BSD = self.source_layernorm(identity_BSD)
        parts = zip(self.weight_projs, traits_BSE.tensor_split(NUM_FEATURES, -1), strict=True)
        weights = [proj(part).unflatten(-1, (self.num_readouts, -1)) for proj, part in parts]
        weight = torch.cat(weights, -1) / math.sqrt(source_BSD.shape[-1])
        readout = torch.einsum("bsrd,bgd->bsgr", weight, features_BGD)
        if left_out_BFGD is not None and fold_BS is not None:
            place, has_fold = fold_BS.clamp(min=0)[..., None, None, None], (fold_BS >= 0)[..., None, None]
            each_BSFGR = torch.einsum("bsrd,bfgd->bsfgr", weight[..., -left_out_BFGD.shape[-1] :], left_out_BFGD)
            readout = torch.where(has_fold, torch.take_along_dim(each_BSFGR, place, 2).squeeze(2), readout)
            own_BSGO = None if own_BSGO is None else torch.where(has_fold, 0.0, own_BSGO)
        out: Tensor = readout + self.bias_proj(source_BSD)[:, :, None]
        if own_BSGO is not None:
            own_weight = self.self_proj(source_BSD).unflatten(-1, (NUM_MOMENTS, NUM_OWN))
            own = torch.einsum("bsro,bsgo->bsgr", own_weight, own_BSGO)
            out = out + F.pad(own, (0, self.num_readouts - NUM_MOMENTS))
        if self.decay_proj is None:
            return out
        decay_s = DECAY_S * bounded(self.decay_proj(source_BSD).float(), LOG_DECAY_LIMIT).exp()
        growth = torch.expm1(bounded(out[..., -1].float(), GAIN_LIMIT))
        integral = leaky_integral(growth, torch.exp(-self.step_s / decay_s)).to(out.dtype)
        last = torch.where(leaks_BS[..., None], integral, out[..., -1])
        return torch.cat([out[..., :-1], last[..., None]], dim=-1)


def trait_parts(config: BrainloomConfig) -> list[int]:
    """How many traits each kind of features is read by: as even as can be, the first the largest."""
    return [(config.unit_embed_size + kind) // NUM_FEATURES for kind in reversed(range(NUM_FEATURES))]


def leaky_integral(x_BSG: Tensor, keep_BS1: Tensor) -> Tensor:
    """y[t] = keep y[t - 1] + (1 - keep) x[t], from y[0] = x[0]: as if it had always been so before the window.

    What an indicator of calcium makes of a rate (Vogelstein 2009), in log2(G) steps: by doubling, each adds what is
    twice as far back.
    """
    num_times = x_BSG.shape[-1]
    first = x_BSG[..., :1]
    y = (1 - keep_BS1) * x_BSG + keep_BS1 * F.pad(first, (0, num_times - 1))
    span, power = 1, keep_BS1
    while span < num_times:
        y = y + power * F.pad(y, (span, 0))[..., :num_times]
        span, power = 2 * span, power**2
    return y


def time_grid(context_s: float, rate_hz: float, device: torch.device) -> Tensor:
    """Middles of the steps of a regular grid over a window, seconds from its start."""
    num_steps = round(context_s * rate_hz)
    if num_steps < 1:
        raise ValueError(f"context_s = {context_s} holds no step of {rate_hz} Hz. Give at least {1 / rate_hz} s.")
    return (torch.arange(num_steps, device=device, dtype=torch.float32) + 0.5) / rate_hz


def sample_times(start_s: Tensor, sample_s: Tensor, is_count: Tensor, num_samples: int) -> Tensor:
    """When each sample of a token is (B, N, P): a count in the middle of its bin, a trace at its instant."""
    sample = torch.arange(num_samples, device=start_s.device)
    time_s: Tensor = start_s[..., None] + (sample + 0.5 * is_count[..., None]) * sample_s[..., None]
    return time_s


def interpolate(readout_BSGR: Tensor, source_BQ: Tensor, time_BQP: Tensor, readout_hz: float) -> Tensor:
    """Readouts (B, Q, P, R) of sources at any time, linear between the times of the grid, constant beyond its ends."""
    num_times = readout_BSGR.shape[2]
    place = (time_BQP * readout_hz - 0.5).clamp(0, num_times - 1)
    lower = place.floor().clamp(max=max(0, num_times - 2))
    index = (
        (source_BQ[..., None] * num_times + lower.long()).flatten(1)[..., None].expand(-1, -1, readout_BSGR.shape[-1])
    )
    flat = readout_BSGR.flatten(1, 2)
    below, above = (flat.gather(1, (index + step).clamp(max=flat.shape[1] - 1)) for step in (0, 1))
    share = (place - lower).flatten(1)[..., None].to(flat.dtype)
    values: Tensor = torch.lerp(below, above, share).unflatten(1, time_BQP.shape[1:])
    return values
