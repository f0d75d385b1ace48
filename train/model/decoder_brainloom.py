"""What is read at each time of a regular grid: what the latents say, what is on the screen, what the population does.

In: latents, frames, what sources did around each time. Out: features that every source reads in its own way.

Shapes: B batch, L latents, F frames, T keys, S sources, G times of the readout grid, J sums, K channels, D hidden_size,
V views of the population: all that is visible, and each time all but one fold.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_brainloom import Angles, BrainloomAttention, BrainloomMLP, BrainloomRMSNorm, key_mask, rotary_angles
from .configuration_brainloom import BrainloomConfig
from .readout_brainloom import BrainloomQuietLinear, time_grid
from .surround_brainloom import NUM_SUMS, Surround

NUM_BLOCKS = 2  # one is not enough for a heading (CONTRIBUTING.md, 2026-11-27)
NUM_FOLDS = 4  # of a population whose units are each read from the others


class BrainloomPopulation(nn.Module):
    """The population around each time: sums of its sources' spans, weighed by who they are, and what they mean."""

    def __init__(self, config: BrainloomConfig) -> None:
        super().__init__()
        size, channels = config.hidden_size, config.population_channels
        self.source_layernorm = BrainloomRMSNorm(size, config.rms_norm_eps)
        self.weight_proj = nn.Linear(size, channels, bias=False)
        self.in_proj = BrainloomQuietLinear(NUM_SUMS * channels, size, bias=False)
        self.gap_proj = BrainloomQuietLinear(2, size)
        self.layernorms = nn.ModuleList(BrainloomRMSNorm(size, config.rms_norm_eps) for _ in range(NUM_BLOCKS))
        self.mlps = nn.ModuleList(BrainloomMLP(config) for _ in range(NUM_BLOCKS))
        self.in_dropout = nn.Dropout(config.population_dropout)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, identity_BSD: Tensor, around: Surround, fold_BS: Tensor | None = None) -> Tensor:
        """(B, V, G, D): what all visible sources say; with folds, then what they say without the first, and so on."""
        weight_BSK = self.weight_proj(self.source_layernorm(identity_BSD))
        kept_BSV = around.seen[..., None]
        if fold_BS is not None:
            others = fold_BS[..., None] != torch.arange(NUM_FOLDS, device=fold_BS.device)
            kept_BSV = torch.cat([kept_BSV, kept_BSV & others], dim=-1)
        weight_BSVK = weight_BSK[:, :, None] * kept_BSV[..., None]
        sums_BGJX = torch.einsum("bsgj,bsx->bgjx", around.sums, weight_BSVK.flatten(2))
        sums_BVGJK = sums_BGJX.unflatten(-1, weight_BSVK.shape[2:]).permute(0, 3, 1, 2, 4)
        sums_BVGJK = sums_BVGJK / kept_BSV.sum(1).clamp(min=1)[..., None, None, None].sqrt()
        out: Tensor = self.in_proj(self.in_dropout(sums_BVGJK.flatten(3).to(weight_BSK.dtype)))
        gap = self.gap_proj(around.mean_gaps(kept_BSV).to(out.dtype))
        for layernorm, mlp in zip(self.layernorms, self.mlps, strict=True):
            out = out + mlp(layernorm(self.dropout(out)) + gap)
        return out


class BrainloomDecoder(GradientCheckpointingLayer):
    """What the latents say at each time of a regular grid, as features that every source reads in its own way.

    The stimulus comes the short way too, from the frames themselves: receptive fields are much finer than what the
    few latents of a step can carry (a core and a modulator, as in Sinz 2018).
    """

    def __init__(self, config: BrainloomConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.config = config
        self.time_embed = nn.Parameter(torch.zeros(1, size))
        self.layernorm = BrainloomRMSNorm(size, eps)
        self.cross_attn = BrainloomAttention(config)
        self.post_attention_layernorm = BrainloomRMSNorm(size, eps)
        self.mlp = BrainloomMLP(config)
        self.norm = BrainloomRMSNorm(size, eps)
        self.frame_embed = nn.Parameter(torch.zeros(1, size))
        self.frame_attn = BrainloomAttention(config)
        self.frame_norm = BrainloomRMSNorm(size, eps)
        self.population = BrainloomPopulation(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        latents_BLD: Tensor,
        latent_time_s: Tensor,
        frames_BTD: Tensor,
        frame_time_BF: Tensor,
        frame_mask_BF: Tensor,
        identity_BSD: Tensor,
        around: Surround,
        context_s: float,
        fold_BS: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Features at each time (B, G, 3 D): what the latents say, what is on the screen, what the population does.

        And the last of the three without each fold of the population (B, V - 1, G, D), where there are folds.
        """
        grid_s = time_grid(context_s, self.config.readout_hz, latents_BLD.device)
        grid_angles = rotary_angles(grid_s[None], self.config)
        x_BGD = self.time_embed.expand(latents_BLD.shape[0], len(grid_s), -1)
        latent_angles = rotary_angles(latent_time_s[None], self.config)
        x_BGD = x_BGD + self.cross_attn(self.layernorm(x_BGD), latents_BLD, grid_angles, latent_angles)
        x_BGD = self.norm(x_BGD + self.mlp(self.post_attention_layernorm(x_BGD)))
        seen_BGD = self._read_frames(grid_angles, frames_BTD, frame_time_BF, frame_mask_BF)
        population_BVGD = self.population(identity_BSD, around, fold_BS)
        features: Tensor = self.dropout(torch.cat([x_BGD, seen_BGD, population_BVGD[:, 0]], dim=-1))
        return features, None if fold_BS is None else self.dropout(population_BVGD[:, 1:])

    def _read_frames(self, grid_angles: Angles, frames_BTD: Tensor, time_BF: Tensor, mask_BF: Tensor) -> Tensor:
        """What is on the screen around each time of the grid (B, G, D); zeros where nothing is, by a null that is."""
        batch, num_times = len(frames_BTD), grid_angles[0].shape[1]
        keys = F.pad(frames_BTD, (0, 0, 1, 0))
        times = F.pad(time_BF.repeat_interleave(self.config.num_patches, dim=1), (1, 0))
        shown = F.pad(mask_BF.repeat_interleave(self.config.num_patches, dim=1), (1, 0), value=True)
        query = self.frame_embed.expand(batch, num_times, -1)
        visible = key_mask(shown, self.config, num_times)
        seen: Tensor = self.frame_norm(
            self.frame_attn(query, keys, grid_angles, rotary_angles(times, self.config), visible)
        )
        return seen
