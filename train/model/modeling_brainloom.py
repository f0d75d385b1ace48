"""Brainloom: one transformer over neuronal activity, stimulus, behaviour and events.

In: tokens that are visible (values, times, sources) and queries (source, time) for what is hidden.
Out: for each query the expected value of its P samples, and the likelihood loss against a null model.

Perceiver-style (Jaegle 2021; for spikes POYO, Azabou 2023): visible tokens are read into latents on a regular time
grid, a trunk works on the latents alone. What comes out is read once per time, into features that all sources share;
a source's own readout, made from its traits, turns them into its prediction (a core and its readouts, as in
Sinz 2018), so that asking for every unit at every time costs next to nothing. Runs under transformers 4.57 and 5.

Shape suffixes: B batch, N visible tokens, Q queries, S sources, F frames, M patches of a frame, P samples per token,
L latents, G times of the readout grid, R numbers of a readout, D hidden_size, E unit_embed_size, M modalities that are
predicted.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import ModelOutput

from .attention_brainloom import (
    Angles,
    AttentionMask,
    BrainloomAttention,
    BrainloomMLP,
    BrainloomRMSNorm,
    local_mask,
    rotary_angles,
)
from .configuration_brainloom import COUNTED, MODALITIES, PREDICTED, BrainloomConfig
from .decoder_brainloom import BrainloomDecoder
from .encoder_brainloom import BrainloomEncoder, BrainloomIdentity
from .history_brainloom import own_history
from .likelihoods_brainloom import Likelihoods, Readout, sum_by_modality
from .readout_brainloom import (
    QUIET,
    BrainloomQuietLinear,
    BrainloomReadout,
    BrainloomZeroLinear,
    interpolate,
    sample_times,
    time_grid,
)
from .stimulus_brainloom import BrainloomPatches, in_order_of_time
from .surround_brainloom import Surround, surround

PART_OF = {  # in which part of the model what is not named like it is counted
    "latent_embed": "encoder",
    "session_proj": "encoder",
    "patches": "encoder",
    "layers": "trunk",
    "norm": "trunk",
    "readout": "decoder",
}
TRACES, SESSION = MODALITIES.index("traces"), MODALITIES.index("session")
TIME_BIAS = 1.2  # of queries and keys at the start: the larger, the nearer they look


@dataclass
class BrainloomModelOutput(ModelOutput):
    """What the trunk made of a window.

    Attributes:
        last_hidden_state: latents (B, L, D).
        latent_time_s: time of each latent (L,), seconds from the window's start.
        identity: by which each source is read (B, S, D).
        traits: of which it is made (B, S, E), and by which the source reads.
        frames: the stimulus (B, F * M, D), each patch with those before it and its place on the screen.
        frame_time_s, frame_mask: of the frames (B, F), in the order of time, those that are not visible last.
        around: what each source did around each time of the readout grid.
    """

    last_hidden_state: Tensor | None = None
    latent_time_s: Tensor | None = None
    identity: Tensor | None = None
    traits: Tensor | None = None
    frames: Tensor | None = None
    frame_time_s: Tensor | None = None
    frame_mask: Tensor | None = None
    around: Surround | None = None


@dataclass
class BrainloomPreTrainingOutput(ModelOutput):
    """Predictions for the queries, and their loss.

    Attributes:
        loss: weighted NLL - NLL_null in nats per observed value, mean over the batch; None without labels.
        predictions: expected value of each sample (B, Q, P): counts per bin for spikes and events, standardised
            value otherwise.
        log_scale: log standard deviation of a Gaussian or Student-t (B, Q, P); not used by other likelihoods.
        interval: lower and upper bound (B, Q, P) that hold a sample with the probability asked for; None unless asked.
        nats: sum of NLL - NLL_null per sample and modality of PREDICTED (B, M).
        num_values: observed values behind `nats` (B, M).
        last_hidden_state: latents (B, L, D).
        features: what every source reads (B, G, 3 D), at the times of the readout grid.
        left_out: what a source that has a fold reads instead (B, folds, G, D); None without folds.
    """

    loss: Tensor | None = None
    predictions: Tensor | None = None
    log_scale: Tensor | None = None
    interval: tuple[Tensor, Tensor] | None = None
    nats: Tensor | None = None
    num_values: Tensor | None = None
    last_hidden_state: Tensor | None = None
    features: Tensor | None = None
    left_out: Tensor | None = None


class BrainloomLayer(GradientCheckpointingLayer):
    """One pre-norm layer of the trunk; a local one sees what is near in time."""

    def __init__(self, config: BrainloomConfig, index: int) -> None:
        super().__init__()
        self.is_local = config.local_window_s is not None and (index + 1) % config.global_every != 0
        self.input_layernorm = BrainloomRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = BrainloomAttention(config, BrainloomZeroLinear)
        self.post_attention_layernorm = BrainloomRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = BrainloomMLP(config, BrainloomZeroLinear)

    def forward(self, x_BLD: Tensor, angles: Angles, near: AttentionMask | None) -> Tensor:
        """(B, L, D) to (B, L, D); `near` is what a local layer may see."""
        normed = self.input_layernorm(x_BLD)
        x_BLD = x_BLD + self.self_attn(normed, normed, angles, angles, near if self.is_local else None)
        out: Tensor = x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))
        return out


class BrainloomPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialising, by transformers."""

    config_class = BrainloomConfig
    config: BrainloomConfig
    base_model_prefix = "model"
    main_input_name = "input_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["BrainloomLayer", "BrainloomEncoder", "BrainloomDecoder"]  # noqa: RUF012  the library's own attribute

    def get_input_embeddings(self) -> nn.Module:
        """By what samples come in: their projection to the model's width. Identities come as `unit_embeds`."""
        return cast(BrainloomModel, self.base_model).encoder.value_proj

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the projection of samples."""
        cast(BrainloomModel, self.base_model).encoder.value_proj = cast(nn.Linear, value)

    def core_parameters(self) -> dict[str, int]:
        """P_core by part; their sum is `num_parameters()`. P_unit, rows x unit_embed_size, lies outside the model."""
        parts = dict.fromkeys(("identity", "encoder", "trunk", "decoder"), 0)
        for name, parameter in self.named_parameters():
            first = name.removeprefix("model.").split(".")[0]
            part = PART_OF.get(first, first)
            parts[part] += getattr(parameter, "ds_numel", parameter.numel())  # under ZeRO-3 a rank holds a piece
        return parts

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            size = {BrainloomZeroLinear: 0.0, BrainloomQuietLinear: QUIET}.get(type(module), 1.0)
            nn.init.normal_(module.weight, std=size / math.sqrt(max(1, module.in_features)))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, BrainloomRMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, BrainloomAttention | BrainloomEncoder):
            nn.init.constant_(module.time_bias, TIME_BIAS)
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith(("_embed", "_key")):
                nn.init.normal_(parameter, std=self.config.initializer_range)


class BrainloomModel(BrainloomPreTrainedModel):
    """Tokens to latents: embedding, reading into the latent grid, trunk."""

    def __init__(self, config: BrainloomConfig) -> None:
        super().__init__(config)
        self.identity = BrainloomIdentity(config)
        self.latent_embed = nn.Parameter(torch.zeros(config.latents_per_step, config.hidden_size))
        self.session_proj = BrainloomZeroLinear(config.unit_embed_size, config.hidden_size, bias=False)  # silent, too
        self.patches = BrainloomPatches(config)
        self.encoder = BrainloomEncoder(config)
        self.layers = nn.ModuleList(BrainloomLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = BrainloomRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        unit_embeds: Tensor,
        unit_features: Tensor,
        source_modality: Tensor,
        input_values: Tensor,
        input_observed: Tensor,
        input_source: Tensor,
        input_time_s: Tensor,
        input_start_s: Tensor,
        input_sample_s: Tensor,
        input_mask: Tensor,
        pixels: Tensor,
        frame_time_s: Tensor,
        frame_mask: Tensor,
        context_s: float | None = None,
    ) -> BrainloomModelOutput:
        """Read a window.

        Args:
            unit_embeds: rows of the unit table (B, S, E), zero where a source has none.
            unit_features: measured features (B, S, U).
            source_modality: modality of each source (B, S), an index into MODALITIES. A session and its subject are
                sources without tokens: their rows are added to all latents, and may be absent.
            input_values: standardised samples of the visible tokens (B, N, P).
            input_observed: which of them exist (B, N, P), bool.
            input_source: source of each token (B, N), an index into S.
            input_time_s: middle of each token (B, N), seconds from the window's start.
            input_start_s: when its first sample starts (B, N).
            input_sample_s: seconds between its samples (B, N).
            input_mask: which tokens are visible (B, N), bool; the others may hold anything, NaN too.
            pixels: stimulus frames (B, F, H, W), standardised.
            frame_time_s: when each frame came on (B, F).
            frame_mask: which frames are visible (B, F), bool.
            context_s: length of the window in seconds; the configuration's if not given.
        """
        dtype = self.latent_embed.dtype  # which users may choose when they load
        unit_embeds, unit_features = unit_embeds.to(dtype), unit_features.to(dtype)
        identity_BSD, traits_BSE = self.identity(unit_embeds, unit_features, source_modality)
        pixels, frame_time_s, frame_mask = in_order_of_time(pixels, frame_time_s, frame_mask)
        observed_BNP = input_observed & input_mask[..., None]
        values_BNP = torch.where(observed_BNP, input_values.to(identity_BSD.dtype), 0.0)
        batch, num_patches = len(pixels), self.config.num_patches
        null = input_mask.new_ones(batch, 1)
        visible = torch.cat([null, input_mask, frame_mask.repeat_interleave(num_patches, dim=1)], dim=1)
        token_time = torch.where(input_mask, input_time_s, 0.0)
        frame_time = torch.where(frame_mask, frame_time_s, 0.0).repeat_interleave(num_patches, dim=1)
        key_time = torch.cat([token_time.new_zeros(batch, 1), token_time, frame_time], dim=1)
        length_s = self.config.context_s if context_s is None else context_s
        grid_s = time_grid(length_s, self.config.latent_hz, input_mask.device)
        session_BE = torch.where((source_modality == SESSION)[..., None], unit_embeds, 0.0).sum(1)
        latents_BLD = self.latent_embed.repeat(len(grid_s), 1) + self.session_proj(session_BE)[:, None]
        latent_time_s = grid_s.repeat_interleave(self.config.latents_per_step)
        angles = rotary_angles(latent_time_s[None], self.config)
        patches = self.patches(pixels, frame_mask)
        x_BLD = self.encoder(
            latents_BLD,
            identity_BSD,
            values_BNP,
            own_history(values_BNP, input_source, token_time, identity_BSD.shape[1], length_s),
            input_source,
            patches,
            frame_mask,
            visible,
            angles,
            rotary_angles(key_time, self.config),
        )
        near = local_mask(latent_time_s, self.config)
        is_counted_BS = is_counted(source_modality)
        around = surround(
            values_BNP,
            observed_BNP,
            input_source,
            torch.where(
                input_mask[..., None],
                sample_times(
                    input_start_s, input_sample_s, is_counted_BS.gather(1, input_source), values_BNP.shape[-1]
                ),
                0.0,
            ),
            is_counted_BS,
            len(time_grid(length_s, self.config.readout_hz, input_mask.device)),
            self.config.readout_hz,
        )
        for layer in self.layers:
            x_BLD = layer(x_BLD, angles, near)
        latents_BLD = self.norm(x_BLD)
        return BrainloomModelOutput(
            last_hidden_state=latents_BLD,
            latent_time_s=latent_time_s,
            identity=identity_BSD,
            traits=traits_BSE,
            frames=patches[0] + patches[1],
            frame_time_s=torch.where(frame_mask, frame_time_s, 0.0),
            frame_mask=frame_mask,
            around=around,
        )


class BrainloomForPreTraining(BrainloomPreTrainedModel):
    """Latents to predictions: queries, heads, likelihoods."""

    def __init__(self, config: BrainloomConfig) -> None:
        super().__init__(config)
        self.model = BrainloomModel(config)
        self.decoder = BrainloomDecoder(config)
        self.readout = BrainloomReadout(config)
        self.likelihoods = Likelihoods(config.likelihoods)
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
        input_start_s: Tensor,
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
        context_s: float | None = None,
        coverage: float | None = None,
        source_fold: Tensor | None = None,
    ) -> BrainloomPreTrainingOutput:
        """Predict the queries; the arguments up to `frame_mask` are BrainloomModel's.

        Args:
            source_null: what the null knows of each source (B, S), positive. Spikes and events: the train split's mean
                count per bin. Traces under zero_inflated_gamma: its mean above physical zero, in standard deviations.
            query_source: source of each query (B, Q), an index into S.
            query_time_s: when its first sample starts (B, Q), seconds from the window's start.
            query_sample_s: seconds between its samples (B, Q).
            labels: the hidden samples (B, Q, P): counts for spikes and events, standardised values otherwise.
            label_mask: which labels were observed (B, Q, P), bool; the others may hold anything, NaN too.
            context_s: length of the window in seconds; the configuration's if not given.
            coverage: probability with which the predictive interval shall hold a sample, for instance 0.9.
            source_fold: fold of each source (B, S), below NUM_FOLDS; -1 of those that have none. What is asked of a
                source that has one is read from the visible sources of no fold or another one: so a whole population
                can be asked for in one pass, each unit from the others.
        """
        outputs = self.model(
            unit_embeds=unit_embeds,
            unit_features=unit_features,
            source_modality=source_modality,
            input_values=input_values,
            input_observed=input_observed,
            input_source=input_source,
            input_time_s=input_time_s,
            input_start_s=input_start_s,
            input_sample_s=input_sample_s,
            input_mask=input_mask,
            pixels=pixels,
            frame_time_s=frame_time_s,
            frame_mask=frame_mask,
            context_s=context_s,
        )
        length_s = self.config.context_s if context_s is None else context_s
        features, left_out = self.decoder(
            outputs.last_hidden_state,
            outputs.latent_time_s,
            outputs.frames,
            outputs.frame_time_s,
            outputs.frame_mask,
            outputs.identity,
            outputs.around,
            length_s,
            source_fold,
        )
        answered = self.answer(
            features,
            (outputs.identity, outputs.traits),
            source_modality,
            source_null,
            query_source,
            query_time_s,
            query_sample_s,
            labels,
            label_mask,
            coverage,
            outputs.around.own,
            left_out,
            source_fold,
        )
        answered.last_hidden_state, answered.features = outputs.last_hidden_state, features
        answered.left_out = left_out
        return answered

    def answer(
        self,
        features: Tensor,
        identity: tuple[Tensor, Tensor],
        source_modality: Tensor,
        source_null: Tensor,
        query_source: Tensor,
        query_time_s: Tensor,
        query_sample_s: Tensor,
        labels: Tensor | None = None,
        label_mask: Tensor | None = None,
        coverage: float | None = None,
        own: Tensor | None = None,
        left_out: Tensor | None = None,
        source_fold: Tensor | None = None,
    ) -> BrainloomPreTrainingOutput:
        """What sources of these identities and traits say by features (B, G, 3 D); the rest is `forward`'s."""
        if (labels is None) != (label_mask is None):
            raise ValueError("labels and label_mask belong together: give both for a loss, or neither.")
        leaks = source_modality == TRACES
        readout_BSGR = self.readout(features, *identity, leaks, own, left_out, source_fold).float()
        modality_BQ = source_modality.gather(1, query_source)
        time_BQP = sample_times(query_time_s, query_sample_s, is_counted(modality_BQ), self.config.samples_per_token)
        readouts = interpolate(readout_BSGR, query_source, time_BQP, self.config.readout_hz)
        null_BQ1 = source_null.gather(1, query_source).float()[..., None]
        readout = Readout.of(readouts, null_BQ1, self.config.log_rate_limit)
        modality_BQ1 = modality_BQ[..., None]
        loss = nats = num_values = None
        if labels is not None and label_mask is not None:
            values = torch.where(label_mask, labels.float(), 0.0)
            excess = self.likelihoods.excess_nats(values, readout, modality_BQ1)
            nats, num_values = sum_by_modality(excess, label_mask, modality_BQ)
            # beta-NLL (Seitzer 2022): else what is hard to predict is called uncertain, and its mean is never learned
            tempered = excess * torch.exp(2 * self.config.scale_tempering * readout.log_std.detach())
            scaleless = is_counted(modality_BQ1)
            if self.config.likelihoods["traces"] == "zero_inflated_gamma":  # has a shape; nothing teaches it a scale
                scaleless = scaleless | (modality_BQ1 == TRACES)
            tempered, _ = sum_by_modality(torch.where(scaleless, excess, tempered), label_mask, modality_BQ)
            weight = nats.new_tensor([self.config.modality_weights[name] for name in PREDICTED])
            loss = (weight * tempered / num_values.clamp(min=1)).sum(1).mean()
        return BrainloomPreTrainingOutput(
            loss=loss,
            predictions=self.likelihoods.expected(readout, modality_BQ1),
            log_scale=readout.log_std,
            interval=None if coverage is None else self.likelihoods.interval(coverage, readout, modality_BQ1),
            nats=nats,
            num_values=num_values,
        )


def is_counted(modality: Tensor) -> Tensor:
    """Whose values are counts in bins; of the shape of what is given, indices into MODALITIES."""
    return torch.stack([modality == MODALITIES.index(name) for name in COUNTED]).any(0)


BrainloomModel.register_for_auto_class("AutoModel")
BrainloomForPreTraining.register_for_auto_class("AutoModelForPreTraining")
