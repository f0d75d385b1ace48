"""Who each source is, and how latents read what is visible of it.

In: measured features and rows of sources, visible tokens and patches. Out: identities, latents that have read.

Shapes: B batch, N visible tokens, S sources, F frames, M patches of a frame, P samples per token, V sums of its
history, L latents, D hidden_size, E unit_embed_size, U measured features, T keys.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_brainloom import Angles, BrainloomMLP, BrainloomRMSNorm, attend, key_mask, rotate
from .configuration_brainloom import MODALITIES, BrainloomConfig
from .history_brainloom import NUM_SUMS
from .readout_brainloom import BrainloomZeroLinear


class BrainloomIdentity(nn.Module):
    """Traits of a source = f(what is measured about it) + its row of the unit table, which may be absent (zero).

    All of them make its identity, by which it is read. How it reads is made of the traits themselves.
    """

    def __init__(self, config: BrainloomConfig) -> None:
        super().__init__()
        self.feature_proj = nn.Linear(config.num_unit_features, config.unit_embed_size)
        # Silent at the start: much that is measured is the same for all units of a recording and would drown the rest.
        self.feature_out = BrainloomZeroLinear(config.unit_embed_size, config.unit_embed_size, bias=False)
        self.out_proj = nn.Linear(config.unit_embed_size, config.hidden_size, bias=False)
        self.modality_embed = nn.Parameter(torch.zeros(len(MODALITIES), config.hidden_size))

    def forward(
        self, unit_embeds_BSE: Tensor, unit_features_BSU: Tensor, source_modality_BS: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Identities (B, S, D) and traits (B, S, E)."""
        traits: Tensor = self.feature_out(F.silu(self.feature_proj(unit_features_BSU))) + unit_embeds_BSE
        return self.out_proj(traits) + self.modality_embed[source_modality_BS], traits


class BrainloomEncoder(GradientCheckpointingLayer):
    """Latents read the visible tokens: found by who and when, read for what.

    Keys are made of identity and time, values of the samples alone, gated by identity; so both are made once per
    source. A source at its mean has no content, whence the mean over many sources is a signal around zero. Times the
    root of their number it is as large for ten sources as for a thousand, and larger where they agree: how sure the
    population is stays in it, which a norm would take away.
    """

    def __init__(self, config: BrainloomConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.config = config
        self.heads = (config.num_attention_heads, size // config.num_attention_heads)
        self.source_layernorm = BrainloomRMSNorm(size, eps)
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.gate_proj = nn.Linear(size, size, bias=False)
        self.value_proj = nn.Linear(config.samples_per_token, size, bias=False)
        self.history_proj = BrainloomZeroLinear(NUM_SUMS, size, bias=False)  # silent until it helps
        self.null_key = nn.Parameter(torch.zeros(1, size))
        self.q_norm = BrainloomRMSNorm(self.heads[1], eps)
        self.k_norm = BrainloomRMSNorm(self.heads[1], eps)
        self.time_bias = nn.Parameter(torch.ones(self.heads[1]))
        self.o_proj = nn.Linear(size, size, bias=False)
        self.post_attention_layernorm = BrainloomRMSNorm(size, eps)
        self.mlp = BrainloomMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        latents_BLD: Tensor,
        identity_BSD: Tensor,
        values_BNP: Tensor,
        history_BNV: Tensor,
        source_BN: Tensor,
        patches: tuple[Tensor, Tensor],
        frame_mask_BF: Tensor,
        key_mask_BT: Tensor,
        q_angles: Angles,
        k_angles: Angles,
    ) -> Tensor:
        """Latents (B, L, D) that have read T = 1 + N + F * M keys: the null, the tokens, the patches.

        The null key is always visible and holds nothing, so that a window in which nothing is visible is defined.
        """
        source_BSD = self.source_layernorm(identity_BSD)
        gate_BND = take_sources(1 + self.gate_proj(source_BSD), source_BN)
        content_BND = (self.value_proj(values_BNP) + self.history_proj(history_BNV)) * gate_BND
        patch_content, place = patches
        null = self.null_key.expand(latents_BLD.shape[0], -1, -1)
        key_BSD, key_place, key_null = (self._keys(x) for x in (source_BSD, place, null))
        key = torch.cat([key_null, take_sources(key_BSD, source_BN), key_place], dim=1)
        value = torch.cat([torch.zeros_like(null), content_BND, patch_content], dim=1)
        query = self.q_norm(self.q_proj(latents_BLD).unflatten(-1, self.heads)) + self.time_bias
        visible = key_mask(key_mask_BT, self.config, query.shape[1])
        read = attend(
            self,
            rotate(query, q_angles),
            rotate(key.unflatten(-1, self.heads), k_angles),
            value.unflatten(-1, self.heads),
            visible,
        )
        loudness_B11 = self._num_seen(source_BN, identity_BSD.shape[1], frame_mask_BF, key_mask_BT).sqrt()
        x_BLD = (latents_BLD + self.o_proj(read).float() * loudness_B11).to(read.dtype)
        out: Tensor = self.dropout(x_BLD + self.mlp(self.post_attention_layernorm(x_BLD)))
        return out

    def _num_seen(self, source_BN: Tensor, num_sources: int, frame_mask_BF: Tensor, key_mask_BT: Tensor) -> Tensor:
        """How many sources, and places of the screen, are visible (B, 1, 1); at least one."""
        shown_BN = key_mask_BT[:, 1 : 1 + source_BN.shape[1]].float()
        seen_BS = shown_BN.new_zeros(len(source_BN), num_sources).scatter_reduce(1, source_BN, shown_BN, "amax")
        places_B = self.config.num_patches * frame_mask_BF.any(1)
        return (seen_BS.sum(1) + places_B).clamp(min=1)[:, None, None]

    def _keys(self, x_BTD: Tensor) -> Tensor:
        key: Tensor = self.k_norm(self.k_proj(x_BTD).unflatten(-1, self.heads)) + self.time_bias
        return key.flatten(2)


def take_sources(identity_BSD: Tensor, source_BN: Tensor) -> Tensor:
    """The identity (B, N, D) of each token's source."""
    return identity_BSD.gather(1, source_BN[..., None].expand(-1, -1, identity_BSD.shape[-1]))
