"""The configuration of Brainloom.

In: keyword arguments or a `config.json`. Out: BrainloomConfig, from which the model is built without further input.
"""

from typing import Any

from transformers import PretrainedConfig

MODALITIES = ("spikes", "traces", "behavior", "stimulus", "events", "session")  # the last: a session, or its subject
LIKELIHOODS = {  # what each modality's values may be drawn from; the first is the default
    "spikes": ("poisson", "negative_binomial"),
    "traces": ("gaussian", "calcium", "student_t", "zero_inflated_gamma"),
    "behavior": ("gaussian", "student_t"),
    "events": ("point_process",),
}
PREDICTED = tuple(name for name in MODALITIES if name in LIKELIHOODS)  # the others are only seen
COUNTED = ("spikes", "events")  # their values are counts in bins
MODALITY_WEIGHTS = {"spikes": 20.0, "traces": 6.0, "behavior": 0.5, "events": 20.0}  # nats of a bin are few
NUM_NUMBERS = {  # of a readout that a family needs, of (location, log scale, shape, zero logit)
    "poisson": 1,
    "point_process": 1,
    "gaussian": 2,
    "calcium": 3,
    "student_t": 3,
    "negative_binomial": 3,
    "zero_inflated_gamma": 4,
}


class BrainloomConfig(PretrainedConfig):
    """Shapes and constants of one Brainloom model.

    Args:
        hidden_size: width D of tokens, latents and queries.
        num_hidden_layers: layers of the trunk.
        num_attention_heads: heads H of every attention.
        intermediate_size: inner width of the SwiGLU blocks.
        unit_embed_size: width E of a row of the unit table.
        num_unit_features: length of a unit's measured features.
        samples_per_token: the most samples P that one token holds.
        image_size: (height, width) to which stimulus frames are resampled.
        patch_size: side of a square image patch in pixels.
        frames_per_patch: how many frames a patch holds, its own and those before.
        context_s: length of a window in seconds, unless a call says otherwise.
        latent_hz: steps of the latent grid per second.
        latents_per_step: latents at each step.
        local_window_s: latents of a local layer of the trunk see those at most this far away; None: all layers are
            global.
        global_every: every how many layers one is global all the same; the last one of each group.
        readout_hz: times per second at which the latents are read out; between them predictions are interpolated.
        population_channels: sums over the population, each weighed in its own way, that readouts see directly.
        population_dropout: how often such a sum is left out in training.
        rope_min_period_s, rope_max_period_s: range of the rotary periods in seconds.
        likelihoods: family of each modality's values, of those in LIKELIHOODS; what is not named is the default.
        hidden_dropout: how often a feature is left out in training: of latents that have read, and of what is read out.
        modality_weights: weight of each modality's nats per observed value in the loss; what is not named has that of
            MODALITY_WEIGHTS.
        scale_tempering: beta of the beta-NLL, for all but counts: 0 is the likelihood, 1 weighs errors as squares do.
        initializer_range: standard deviation of embeddings at the start.
        log_rate_limit: largest |log rate - log null rate| of a count.
    """

    model_type = "brainloom"

    def __init__(
        self,
        hidden_size: int = 128,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        intermediate_size: int = 344,
        unit_embed_size: int = 64,
        num_unit_features: int = 28,
        samples_per_token: int = 16,
        image_size: tuple[int, int] = (24, 24),
        patch_size: int = 24,
        frames_per_patch: int = 4,
        context_s: float = 2.0,
        latent_hz: float = 10.0,
        latents_per_step: int = 4,
        local_window_s: float | None = None,
        global_every: int = 4,
        readout_hz: float = 50.0,
        population_channels: int = 64,
        population_dropout: float = 0.0,
        rope_min_period_s: float = 0.1,
        rope_max_period_s: float = 60.0,
        likelihoods: dict[str, str] | None = None,
        hidden_dropout: float = 0.0,
        modality_weights: dict[str, float] | None = None,
        scale_tempering: float = 0.7,
        log_rate_limit: float = 6.0,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.3,
        **kwargs: Any,
    ) -> None:
        if hidden_size % (2 * num_attention_heads):
            raise ValueError(
                f"hidden_size {hidden_size} must be a multiple of 2 x num_attention_heads ({num_attention_heads}): "
                "rotary positions turn pairs of channels."
            )
        if any(side % patch_size for side in image_size):
            raise ValueError(f"image_size {tuple(image_size)} must be a multiple of patch_size {patch_size}.")
        if global_every < 1 or (local_window_s is not None and local_window_s <= 0):
            raise ValueError(
                f"local_window_s {local_window_s} must be more than 0 (None: every layer is global), "
                f"global_every {global_every} at least 1."
            )
        chosen = {name: known[0] for name, known in LIKELIHOODS.items()} | (likelihoods or {})
        for name, family in chosen.items():
            if family not in LIKELIHOODS.get(name, ()):
                valid = "; ".join(f"{modality}: {', '.join(known)}" for modality, known in LIKELIHOODS.items())
                raise ValueError(f"likelihoods: {name} = {family!r} is not known. Valid are {valid}.")
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.unit_embed_size = unit_embed_size
        self.num_unit_features = num_unit_features
        self.samples_per_token = samples_per_token
        self.image_size = list(image_size)
        self.patch_size = patch_size
        self.frames_per_patch = frames_per_patch
        self.context_s = context_s
        self.latent_hz = latent_hz
        self.latents_per_step = latents_per_step
        self.local_window_s = local_window_s
        self.global_every = global_every
        self.readout_hz = readout_hz
        self.population_channels = population_channels
        self.population_dropout = population_dropout
        self.rope_min_period_s = rope_min_period_s
        self.rope_max_period_s = rope_max_period_s
        self.likelihoods = chosen
        self.hidden_dropout = hidden_dropout
        self.scale_tempering = scale_tempering
        self.modality_weights = MODALITY_WEIGHTS | (modality_weights or {})
        self.log_rate_limit = log_rate_limit
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        super().__init__(**kwargs)

    @property
    def num_readouts(self) -> int:
        """Numbers R that a readout has: as many as the family that needs most."""
        return max(NUM_NUMBERS[family] for family in self.likelihoods.values())

    @property
    def num_patches(self) -> int:
        """Patches M of a frame."""
        height, width = self.image_size
        return (height // self.patch_size) * (width // self.patch_size)


BrainloomConfig.register_for_auto_class()
