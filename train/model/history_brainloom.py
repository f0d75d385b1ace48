"""What a source did around each of its visible tokens: sums over several spans of time, compressed.

In: visible values, zero where nothing is, with their sources and times. Out: twelve numbers beside each token.

Attention sums over sources before anything is bent; a unit's own rate has to be bent first, for the rates of two units
are near powers of each other. Sums over the last and the next 0.1 to 0.8 s let a token say what its unit does for long.

Shapes: B batch, N visible tokens, S sources, P samples per token, K steps of 100 ms, C sums.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

STEP_S = 0.1
SPANS = (1, 2, 4, 8)  # steps
NUM_SUMS = 3 * len(SPANS)  # of the past, of the future, of both


def own_history(values_BNP: Tensor, source_BN: Tensor, time_s_BN: Tensor, num_sources: int, context_s: float) -> Tensor:
    """sign(x) log(1 + |x|) of the sums x (B, N, C) of each token's source, up to and from the token's own step on."""
    num_steps = round(context_s / STEP_S) + 1
    step_BN = (time_s_BN / STEP_S).floor().long().clamp(0, num_steps - 1)
    place_BN = source_BN * num_steps + step_BN
    total = values_BNP.new_zeros(len(source_BN), num_sources * num_steps, dtype=torch.float32)
    total = total.scatter_add(1, place_BN, values_BNP.float().sum(-1))
    sums = spans(total.unflatten(1, (num_sources, num_steps))).flatten(1, 2)
    compressed = sums.sign() * sums.abs().log1p()
    return compressed.gather(1, place_BN[..., None].expand(-1, -1, NUM_SUMS)).to(values_BNP.dtype)


def spans(total_BSK: Tensor) -> Tensor:
    """Sums (B, S, K, C) of the span that ends with a step, of the one that begins with it, and of both together."""
    most, num_steps = SPANS[-1], total_BSK.shape[-1]
    padded = F.pad(total_BSK, (most, most))
    until = F.pad(padded.cumsum(-1), (1, 0))  # until[k]: everything before padded step k

    def sums(begin: int, stop: int) -> Tensor:
        """Over the steps [k + begin, k + stop) of every step k."""
        return until[..., most + stop : most + stop + num_steps] - until[..., most + begin : most + begin + num_steps]

    each = [(sums(1 - span, 1), sums(0, span), sums(1 - span, span)) for span in SPANS]
    return torch.stack([part for parts in each for part in parts], dim=-1)
