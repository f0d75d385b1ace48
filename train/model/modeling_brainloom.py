"""Brainloom: one transformer over neuronal activity, stimulus and behaviour.

In: tokens that are visible (values, times, sources) and queries (source, time) for what is hidden.
Out: for each query the expected value of its P samples, and the likelihood loss against a null model.

Perceiver-style (Jaegle 2021; for spikes POYO, Azabou 2023): visible tokens are read into latents on a regular time
grid, a trunk works on the latents alone, and queries read the latents.

Shape suffixes: B batch, N visible tokens, Q queries, S sources, F frames, M patches of a frame, P samples per token,
L latents, D hidden_size, E unit_embed_size, H heads, C channels of a head, T keys.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from .configuration_brainloom import MODALITIES, BrainloomConfig

SPIKES, TRACES, BEHAVIOR, STIMULUS = range(len(MODALITIES))
LOG_SCALE_LIMIT = 3.0  # a Gaussian's log standard deviation stays within +-3 of the train split's


@dataclass
class BrainloomModelOutput(ModelOutput):
    """What the trunk made of a window.

    Attributes:
        last_hidden_state: latents (B, L, D).
        latent_time_s: time of each latent (L,), seconds from the window's start.
    """

    last_hidden_state: Tensor | None = None
    latent_time_s: Tensor | None = None


@dataclass
class BrainloomPreTrainingOutput(ModelOutput):
    """Predictions for the queries, and their loss.

    Attributes:
        loss: weighted NLL - NLL_null in nats per observed value, mean over the batch; None without labels.
        predictions: expected value of each sample (B, Q, P): counts per bin for spikes, standardised value otherwise.
        log_scale: log standard deviation of the Gaussian (B, Q, P); not used for spikes.
        nats: sum of NLL - NLL_null per sample and modality (B, 3).
        num_values: observed values behind `nats` (B, 3).
        last_hidden_state: latents (B, L, D).
    """

    loss: Tensor | None = None
    predictions: Tensor | None = None
    log_scale: Tensor | None = None
    nats: Tensor | None = None
    num_values: Tensor | None = None
    last_hidden_state: Tensor | None = None


class BrainloomRMSNorm(nn.Module):
    """Root mean square norm (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class BrainloomZeroLinear(nn.Linear):
    """A linear map that starts at zero: a residual branch that is silent, a head whose prediction is its null."""


class BrainloomMLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: BrainloomConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = BrainloomZeroLinear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to (…, D)."""
        down: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return down


def rotary_angles(time_s: Tensor, config: BrainloomConfig) -> tuple[Tensor, Tensor]:
    """Cos and sin of the rotary phase (…, C/2) of times in seconds: RoPE (Su 2021) on real time, not on an index."""
    num_pairs = config.hidden_size // config.num_attention_heads // 2
    steps = torch.arange(num_pairs, device=time_s.device, dtype=torch.float32) / max(1, num_pairs - 1)
    period_s = config.rope_min_period_s * (config.rope_max_period_s / config.rope_min_period_s) ** steps
    phase = 2 * math.pi * time_s.float()[..., None] / period_s
    return phase.cos(), phase.sin()


def rotate(x_BHTC: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn channel pairs by the token's phase; angles are (B or 1, T, C/2)."""
    cos, sin = (angle[:, None].to(x_BHTC.dtype) for angle in angles)
    first, second = x_BHTC.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class BrainloomAttention(nn.Module):
    """Attention with QK-norm (Henry 2020) and rotary time.

    The learned `time_bias` is added to queries and keys before they are turned. It starts at one, so that attention
    prefers what is near in time before anything is learned, and can be unlearned.
    """

    def __init__(self, config: BrainloomConfig, output: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
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
        value_BTD: Tensor,
        query_angles: tuple[Tensor, Tensor],
        key_angles: tuple[Tensor, Tensor],
        key_mask_BT: Tensor | None = None,
    ) -> Tensor:
        """Queries (B, Q, D) find by `context_BTD` and read `value_BTD`, both (B, T, D), where `key_mask_BT` is true."""
        q, k, v = (
            projection(source).unflatten(-1, (self.num_heads, self.head_size)).transpose(1, 2)
            for projection, source in ((self.q_proj, x_BQD), (self.k_proj, context_BTD), (self.v_proj, value_BTD))
        )
        q = rotate(self.q_norm(q) + self.time_bias, query_angles)
        k = rotate(self.k_norm(k) + self.time_bias, key_angles)
        mask = None if key_mask_BT is None else key_mask_BT[:, None, None, :]
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: Tensor = self.o_proj(read.transpose(1, 2).flatten(2))
        return out


class BrainloomLayer(nn.Module):
    """One pre-norm layer of the trunk."""

    def __init__(self, config: BrainloomConfig) -> None:
        super().__init__()
        self.input_layernorm = BrainloomRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = BrainloomAttention(config, BrainloomZeroLinear)
        self.post_attention_layernorm = BrainloomRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = BrainloomMLP(config)

    def forward(self, x_BLD: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        normed = self.input_layernorm(x_BLD)
        x_BLD = x_BLD + self.self_attn(normed, normed, normed, angles, angles)
        out: Tensor = x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))
        return out


class BrainloomCrossLayer(nn.Module):
    """One layer in which queries read a context; what is read is normed, and gated by who asks.

    A mean over many sources is small, and the smaller the more there are: without the norm on what was read, the
    signal would drown beside the queries' own embedding.
    """

    def __init__(self, config: BrainloomConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.query_layernorm = BrainloomRMSNorm(size, eps)
        self.context_layernorm = BrainloomRMSNorm(size, eps)
        self.cross_attn = BrainloomAttention(config)
        self.read_layernorm = BrainloomRMSNorm(size, eps)
        self.gate_proj = nn.Linear(size, size, bias=False)
        self.post_attention_layernorm = BrainloomRMSNorm(size, eps)
        self.mlp = BrainloomMLP(config)

    def forward(
        self,
        x_BQD: Tensor,
        context_BTD: Tensor,
        value_BTD: Tensor,
        query_angles: tuple[Tensor, Tensor],
        key_angles: tuple[Tensor, Tensor],
        key_mask_BT: Tensor | None = None,
    ) -> Tensor:
        """(B, Q, D) reads `value_BTD` (B, T, D), found by `context_BTD`."""
        query = self.query_layernorm(x_BQD)
        context = self.context_layernorm(context_BTD)
        read = self.cross_attn(query, context, value_BTD, query_angles, key_angles, key_mask_BT)
        x_BQD = x_BQD + self.read_layernorm(read) * (1 + self.gate_proj(query))
        out: Tensor = x_BQD + self.mlp(self.post_attention_layernorm(x_BQD))
        return out


class BrainloomIdentity(nn.Module):
    """Identity of a source = f(what is measured about it) + its row of the unit table, which may be absent (zero)."""

    def __init__(self, config: BrainloomConfig) -> None:
        super().__init__()
        self.feature_proj = nn.Linear(config.num_unit_features, config.unit_embed_size)
        self.feature_out = nn.Linear(config.unit_embed_size, config.unit_embed_size, bias=False)
        self.out_proj = nn.Linear(config.unit_embed_size, config.hidden_size, bias=False)
        self.modality_embed = nn.Parameter(torch.zeros(len(MODALITIES), config.hidden_size))

    def forward(self, unit_embeds_BSE: Tensor, unit_features_BSU: Tensor, source_modality_BS: Tensor) -> Tensor:
        """Identities (B, S, D)."""
        features = self.feature_out(F.silu(self.feature_proj(unit_features_BSU)))
        identity: Tensor = self.out_proj(features + unit_embeds_BSE)
        return identity + self.modality_embed[source_modality_BS]


class BrainloomTokenEmbedding(nn.Module):
    """A token's content is its P samples, seen through its source's identity; it is found by content and identity.

    Which samples exist, and how far apart they are, is only searched by: content is zero where nothing happens.
    """

    def __init__(self, config: BrainloomConfig) -> None:
        super().__init__()
        num_samples = config.samples_per_token
        self.value_proj = nn.ModuleList(nn.Linear(num_samples, config.hidden_size, bias=False) for _ in MODALITIES[:3])
        self.shape_proj = nn.Linear(num_samples + 1, config.hidden_size, bias=False)
        self.gate_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        values_BNP: Tensor,
        observed_BNP: Tensor,
        identity_BSD: Tensor,
        source_BN: Tensor,
        geometry_BN: Tensor,
        modality_BN: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Content and content with identity, both (B, N, D). Every modality's projection runs on every token: all ranks run all branches."""
        gate_BND = take_sources(1 + self.gate_proj(identity_BSD), source_BN)
        identity_BND = take_sources(identity_BSD, source_BN)
        observed = observed_BNP.to(identity_BND.dtype)
        values = torch.where(observed_BNP, values_BNP.to(identity_BND.dtype), 0.0)
        shape = torch.cat([observed, geometry_BN[..., None].to(identity_BND.dtype)], dim=-1)
        value_BND = identity_BND.new_zeros(identity_BND.shape)
        for modality, projection in enumerate(self.value_proj):
            value_BND = torch.where((modality_BN == modality)[..., None], projection(values), value_BND)
        content_BND = value_BND * gate_BND
        return content_BND, content_BND + identity_BND + self.shape_proj(shape)


class BrainloomPatchEmbedding(nn.Module):
    """Stimulus frames to patch tokens."""

    def __init__(self, config: BrainloomConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        num_patches = math.prod(side // config.patch_size for side in config.image_size)
        self.pixel_proj = nn.Linear(config.patch_size**2, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.position_embed = nn.Parameter(torch.zeros(num_patches, config.hidden_size))

    def forward(self, pixels_BFHW: Tensor, frame_mask_BF: Tensor) -> tuple[Tensor, Tensor]:
        """Content and content with position, both (B, F * M, D); masked frames are zeroed before anything is computed from them."""
        pixels = torch.where(frame_mask_BF[..., None, None], pixels_BFHW.to(self.pixel_proj.weight.dtype), 0.0)
        side = self.patch_size
        patches = pixels.unflatten(3, (-1, side)).unflatten(2, (-1, side)).transpose(3, 4).flatten(4).flatten(2, 3)
        content: Tensor = self.out_proj(F.silu(self.pixel_proj(patches)))
        return content.flatten(1, 2), (content + self.position_embed).flatten(1, 2)


class BrainloomPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialising, by transformers."""

    config_class = BrainloomConfig
    config: BrainloomConfig
    base_model_prefix = "model"
    main_input_name = "input_values"
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = ["BrainloomLayer", "BrainloomCrossLayer"]

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, BrainloomZeroLinear):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1 / math.sqrt(max(1, module.in_features)))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, BrainloomRMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, BrainloomAttention):
            nn.init.ones_(module.time_bias)
        elif isinstance(module, BrainloomIdentity):
            nn.init.normal_(module.modality_embed, std=0.3)
        elif isinstance(module, BrainloomPatchEmbedding):
            nn.init.normal_(module.position_embed, std=1.0)
        elif isinstance(module, BrainloomModel):
            nn.init.normal_(module.latent_embed, std=1.0)
            nn.init.normal_(module.null_token, std=std)


class BrainloomModel(BrainloomPreTrainedModel):
    """Tokens to latents: embedding, reading into the latent grid, trunk."""

    def __init__(self, config: BrainloomConfig) -> None:
        super().__init__(config)
        self.identity = BrainloomIdentity(config)
        self.token_embed = BrainloomTokenEmbedding(config)
        self.patch_embed = BrainloomPatchEmbedding(config)
        self.null_token = nn.Parameter(torch.zeros(config.hidden_size))
        self.latent_embed = nn.Parameter(torch.zeros(config.latents_per_step, config.hidden_size))
        self.encoder = BrainloomCrossLayer(config)
        self.layers = nn.ModuleList(BrainloomLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = BrainloomRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def latent_times(self, device: torch.device) -> Tensor:
        """Time of each latent (L,), seconds from the window's start: the middle of its step."""
        num_steps = round(self.config.context_s * self.config.latent_hz)
        step = torch.arange(num_steps, device=device, dtype=torch.float32)
        return ((step + 0.5) / self.config.latent_hz).repeat_interleave(self.config.latents_per_step)

    def forward(
        self,
        unit_embeds: Tensor,
        unit_features: Tensor,
        source_modality: Tensor,
        input_values: Tensor,
        input_observed: Tensor,
        input_source: Tensor,
        input_time_s: Tensor,
        input_sample_s: Tensor,
        input_mask: Tensor,
        pixels: Tensor,
        frame_time_s: Tensor,
        frame_mask: Tensor,
    ) -> BrainloomModelOutput:
        """Read a window.

        Args:
            unit_embeds: rows of the unit table (B, S, E), zero where a source has none.
            unit_features: measured features (B, S, U).
            source_modality: modality of each source (B, S), an index into MODALITIES.
            input_values: standardised samples of the visible tokens (B, N, P).
            input_observed: which of them exist (B, N, P), bool.
            input_source: source of each token (B, N), an index into S.
            input_time_s: middle of each token (B, N), seconds from the window's start.
            input_sample_s: seconds between two samples of the token (B, N).
            input_mask: which tokens are visible (B, N), bool; the others may hold anything, NaN too.
            pixels: stimulus frames (B, F, H, W), standardised.
            frame_time_s: when each frame came on (B, F).
            frame_mask: which frames are visible (B, F), bool.
        """
        identity_BSD = self.identity(unit_embeds, unit_features, source_modality)
        modality_BN = source_modality.gather(1, input_source)
        observed_BNP = input_observed & input_mask[..., None]
        time_BN = torch.where(input_mask, input_time_s, 0.0)
        geometry_BN = sample_geometry(torch.where(input_mask, input_sample_s, 1.0))
        content_BND, tokens_BND = self.token_embed(
            input_values, observed_BNP, identity_BSD, input_source, geometry_BN, modality_BN
        )
        patch_content, patches = self.patch_embed(pixels, frame_mask)
        num_patches = patches.shape[1] // max(1, pixels.shape[1])
        batch = tokens_BND.shape[0]
        null = self.null_token.expand(batch, 1, -1)
        context = torch.cat([null, tokens_BND, patches], dim=1)
        content = torch.cat([torch.zeros_like(null), content_BND, patch_content], dim=1)
        frame_time = torch.where(frame_mask, frame_time_s, 0.0).repeat_interleave(num_patches, dim=1)
        key_time = torch.cat([time_BN.new_zeros(batch, 1), time_BN, frame_time], dim=1)
        key_mask = torch.cat(
            [input_mask.new_ones(batch, 1), input_mask, frame_mask.repeat_interleave(num_patches, dim=1)], dim=1
        )
        latent_time_s = self.latent_times(context.device)
        latents = self.latent_embed.repeat(len(latent_time_s) // self.config.latents_per_step, 1)
        angles = rotary_angles(latent_time_s[None], self.config)
        key_angles = rotary_angles(key_time, self.config)
        x_BLD = self.encoder(latents.expand(batch, -1, -1), context, content, angles, key_angles, key_mask)
        for layer in self.layers:
            x_BLD = layer(x_BLD, angles)
        return BrainloomModelOutput(last_hidden_state=self.norm(x_BLD), latent_time_s=latent_time_s)


class BrainloomForPreTraining(BrainloomPreTrainedModel):
    """Latents to predictions: queries, heads, likelihoods."""

    def __init__(self, config: BrainloomConfig) -> None:
        super().__init__(config)
        self.model = BrainloomModel(config)
        self.query_geometry = nn.Linear(1, config.hidden_size, bias=False)
        self.decoder = nn.ModuleList(BrainloomCrossLayer(config) for _ in range(config.num_decoder_layers))
        self.norm = BrainloomRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.count_head = BrainloomZeroLinear(config.hidden_size, config.samples_per_token)
        self.trace_head = BrainloomZeroLinear(config.hidden_size, 2 * config.samples_per_token)
        self.post_init()

    def forward(
        self,
        unit_embeds: Tensor,
        unit_features: Tensor,
        source_modality: Tensor,
        source_null: Tensor,
        input_values: Tensor,
        input_observed: Tensor,
        input_source: Tensor,
        input_time_s: Tensor,
        input_sample_s: Tensor,
        input_mask: Tensor,
        pixels: Tensor,
        frame_time_s: Tensor,
        frame_mask: Tensor,
        query_source: Tensor,
        query_time_s: Tensor,
        query_sample_s: Tensor,
        labels: Tensor | None = None,
        label_mask: Tensor | None = None,
    ) -> BrainloomPreTrainingOutput:
        """Predict the queries; the arguments up to `frame_mask` are BrainloomModel's.

        Args:
            source_null: mean count per bin on the train split (B, S), positive; used for spikes alone.
            query_source, query_time_s, query_sample_s: what is asked (B, Q), as for the input tokens.
            labels: the hidden samples (B, Q, P): counts for spikes, standardised values otherwise.
            label_mask: which labels were observed (B, Q, P), bool; the others may hold anything, NaN too.
        """
        outputs = self.model(
            unit_embeds=unit_embeds,
            unit_features=unit_features,
            source_modality=source_modality,
            input_values=input_values,
            input_observed=input_observed,
            input_source=input_source,
            input_time_s=input_time_s,
            input_sample_s=input_sample_s,
            input_mask=input_mask,
            pixels=pixels,
            frame_time_s=frame_time_s,
            frame_mask=frame_mask,
        )
        latents_BLD = outputs.last_hidden_state
        identity_BSD = self.model.identity(unit_embeds, unit_features, source_modality)
        x_BQD = take_sources(identity_BSD, query_source) + self.query_geometry(
            sample_geometry(query_sample_s)[..., None]
        )
        query_angles = rotary_angles(query_time_s, self.config)
        key_angles = rotary_angles(outputs.latent_time_s[None], self.config)
        for layer in self.decoder:
            x_BQD = layer(x_BQD, latents_BLD, latents_BLD, query_angles, key_angles)
        x_BQD = self.norm(x_BQD)
        delta = self.count_head(x_BQD).float()
        mean, log_scale = self.trace_head(x_BQD).float().chunk(2, dim=-1)
        limit = self.config.log_rate_limit
        null_BQ1 = source_null.gather(1, query_source).float()[..., None]
        log_rate = null_BQ1.log() + limit * torch.tanh(delta / limit)
        log_scale = LOG_SCALE_LIMIT * torch.tanh(log_scale / LOG_SCALE_LIMIT)
        modality_BQ = source_modality.gather(1, query_source)
        predictions = torch.where((modality_BQ == SPIKES)[..., None], log_rate.exp(), mean)
        result = BrainloomPreTrainingOutput(predictions=predictions, log_scale=log_scale, last_hidden_state=latents_BLD)
        if labels is not None and label_mask is not None:
            values = torch.where(label_mask, labels.float(), 0.0)
            excess = torch.where(
                (modality_BQ == SPIKES)[..., None],
                poisson_excess_nats(values, log_rate, null_BQ1),
                gaussian_excess_nats(values, mean, log_scale),
            )
            result.nats, result.num_values = sum_by_modality(excess, label_mask, modality_BQ)
            weight = result.nats.new_tensor([self.config.modality_weights[name] for name in MODALITIES[:3]])
            result.loss = (weight * result.nats / result.num_values.clamp(min=1)).sum(1).mean()
        return result


def take_sources(identity_BSD: Tensor, source_BN: Tensor) -> Tensor:
    """The identity (B, N, D) of each token's source."""
    return identity_BSD.gather(1, source_BN[..., None].expand(-1, -1, identity_BSD.shape[-1]))


def sample_geometry(sample_s: Tensor) -> Tensor:
    """A bounded number for the time between two samples: 0 at 20 ms, +-1 a decade away."""
    return (sample_s.clamp(min=1e-4) / 0.02).log10()


def poisson_excess_nats(counts: Tensor, log_rate: Tensor, null_rate: Tensor) -> Tensor:
    """Poisson NLL minus that of the null rate, nats per value; the counts' factorial cancels."""
    return (log_rate.exp() - counts * log_rate) - (null_rate - counts * null_rate.log())


def gaussian_excess_nats(values: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Gaussian NLL minus that of the train split's mean and variance (0 and 1 after standardising), nats per value."""
    return 0.5 * (((values - mean) * torch.exp(-log_scale)) ** 2 - values**2) + log_scale


def sum_by_modality(excess_BQP: Tensor, mask_BQP: Tensor, modality_BQ: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of nats and numbers of values, both (B, 3)."""
    per_query = torch.where(mask_BQP, excess_BQP, 0.0).sum(-1)
    observed = mask_BQP.sum(-1).to(per_query.dtype)
    is_modality = F.one_hot(modality_BQ, len(MODALITIES))[..., :3].to(per_query.dtype)
    return torch.einsum("bq,bqm->bm", per_query, is_modality), torch.einsum("bq,bqm->bm", observed, is_modality)


BrainloomModel.register_for_auto_class("AutoModel")
BrainloomForPreTraining.register_for_auto_class("AutoModelForPreTraining")
