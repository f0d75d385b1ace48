"""Attention on real time: rotary phases, what may be seen, and one door to every implementation of transformers.

In: queries, keys and values with their times in seconds; which keys may be seen. Out: what each query reads.

`config._attn_implementation` names who computes: eager and sdpa anywhere, flex_attention (no backward on CPU) and any
other function that is registered with transformers; flash_attention_* cannot express our masks, so that reads with one
(of the visible tokens; of local layers) go through sdpa there, and all others through flash.

Shape suffixes: B batch, Q queries, T keys, D hidden_size, H heads, C channels of a head.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_brainloom import BrainloomConfig

Angles = tuple[Tensor, Tensor]  # cos and sin of rotary phases
AttentionMask = Any  # a bool tensor (B or 1, 1, Q or 1, T), or flex_attention's BlockMask


class BrainloomRMSNorm(nn.Module):
    """Root mean square norm (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class BrainloomMLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: BrainloomConfig, output: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = output(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to (…, D)."""
        down: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return down


def rotary_angles(time_s: Tensor, config: BrainloomConfig) -> Angles:
    """Cos and sin of the rotary phase (…, C/2) of times in seconds: RoPE (Su 2021) on real time, not on an index."""
    num_pairs = config.hidden_size // config.num_attention_heads // 2
    steps = torch.arange(num_pairs, device=time_s.device, dtype=torch.float32) / max(1, num_pairs - 1)
    period_s = config.rope_min_period_s * (config.rope_max_period_s / config.rope_min_period_s) ** steps
    phase = 2 * math.pi * time_s.float()[..., None] / period_s
    return phase.cos(), phase.sin()


def rotate(x_BTHC: Tensor, angles: Angles) -> Tensor:
    """Turn channel pairs by the token's phase, in float32 as phases need it; angles are (B or 1, T, C/2)."""
    cos, sin = (angle[:, :, None] for angle in angles)
    first, second = x_BTHC.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BTHC.dtype)


def key_mask(visible_BT: Tensor, config: BrainloomConfig, num_queries: int) -> AttentionMask:
    """Keys that are visible, the same for all queries, as the configured implementation takes it."""
    if config._attn_implementation != "flex_attention":
        return visible_BT[:, None, None]
    return block_mask(lambda b, h, q, k: visible_BT[b, k], len(visible_BT), num_queries, visible_BT)


def local_mask(time_s: Tensor, config: BrainloomConfig) -> AttentionMask | None:
    """Who sees whom in a local layer: what is at most `local_window_s` away, of times (T,); None without a window."""
    if config.local_window_s is None:
        return None
    limit_s = time_s.new_full((), config.local_window_s + 1e-6)  # a tensor: flex_attention cannot capture a number
    if config._attn_implementation != "flex_attention":
        return ((time_s[:, None] - time_s[None]).abs() <= limit_s)[None, None]
    return block_mask(lambda b, h, q, k: (time_s[q] - time_s[k]).abs() <= limit_s, None, len(time_s), time_s)


def block_mask(may_see: Callable[..., Tensor], batch: int | None, num_queries: int, keys: Tensor) -> AttentionMask:
    """flex_attention's mask, where `may_see(batch, head, query, key)`; `keys` are (…, T)."""
    from torch.nn.attention.flex_attention import create_block_mask  # not in every build of torch

    return create_block_mask(may_see, batch, None, num_queries, keys.shape[-1], device=keys.device)


def attend(
    module: nn.Module, q_BQHC: Tensor, k_BTHC: Tensor, v_BTHC: Tensor, mask: AttentionMask | None = None
) -> Tensor:
    """Softmax attention (B, Q, H * C) by the implementation that `module.config` names."""
    name: str = cast(BrainloomConfig, module.config)._attn_implementation
    if mask is not None and "flash" in name:
        name = "sdpa"
    function = eager_attention if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    q, k, v = (x.transpose(1, 2) for x in (q_BQHC, k_BTHC, v_BTHC))
    scaling = q.shape[-1] ** -0.5
    read: Tensor = function(module, q, k, v, mask, dropout=0.0, scaling=scaling, is_causal=False)[0]
    return read.flatten(2)


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """The textbook's: (B, Q, H, C), and the weights (B, H, Q, T); softmax in float32."""
    scores = query @ key.transpose(2, 3) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class BrainloomAttention(nn.Module):
    """Attention with QK-norm (Henry 2020) and rotary time.

    The learned `time_bias` is added to queries and keys before they are turned. It starts positive, so that attention
    prefers what is near in time before anything is learned, and can be unlearned.
    """

    def __init__(self, config: BrainloomConfig, output: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.config = config
        size, self.num_heads = config.hidden_size, config.num_attention_heads
        self.head_size = size // self.num_heads
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.o_proj = output(size, size, bias=False)
        self.q_norm = BrainloomRMSNorm(self.head_size, config.rms_norm_eps)
        self.k_norm = BrainloomRMSNorm(self.head_size, config.rms_norm_eps)
        self.time_bias = nn.Parameter(torch.ones(self.head_size))

    def forward(
        self,
        x_BQD: Tensor,
        context_BTD: Tensor,
        q_angles: Angles,
        k_angles: Angles,
        mask: AttentionMask | None = None,
    ) -> Tensor:
        """Queries (B, Q, D) read a context (B, T, D)."""
        split = (self.num_heads, self.head_size)
        q, k, v = (
            projection(source).unflatten(-1, split)
            for projection, source in ((self.q_proj, x_BQD), (self.k_proj, context_BTD), (self.v_proj, context_BTD))
        )
        q = rotate(self.q_norm(q) + self.time_bias, q_angles)
        k = rotate(self.k_norm(k) + self.time_bias, k_angles)
        out: Tensor = self.o_proj(attend(self, q, k, v, mask))
        return out
