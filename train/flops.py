"""How large a model is and what it computes: parameters and floating point operations, by formula.

In: a model's configuration and the shape of a batch. Out: numbers by part, which agree with the model that is built
(tests/test_train_flops.py); what a whole run needs of a machine is train/dry_run.py's to say.

Counted are matrix products, two operations for each multiply-add; nothing else is worth a GPU's time. The backward pass
takes two products for each of the forward pass, one for the weights and one for what came in, if that learns.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from train.config import RunConfig
from train.masking import num_folds
from train.model.configuration_brainloom import MODALITIES, BrainloomConfig
from train.model.decoder_brainloom import NUM_BLOCKS
from train.model.history_brainloom import NUM_SUMS
from train.model.readout_brainloom import NUM_MOMENTS, trait_parts
from train.model.surround_brainloom import NUM_OWN
from train.model.surround_brainloom import NUM_SUMS as NUM_AROUND

PARTS = ("identity", "encoder", "trunk", "decoder")
TOKENS_PER_S = 10  # of each unit (prep: a token is 100 ms)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one batch."""

    batch: int = 1
    sources: int
    tokens: int  # visible ones of each sample
    frames: int
    context_s: float
    folds: int = 0  # of a population whose units are read from each other
    queries: int = 1  # tokens of each sample that are asked for; what they cost is no matrix product


@dataclass(frozen=True)
class Product:
    """A matrix product (rows, inner) x (inner, columns); `learns`: its left side has a gradient too."""

    rows: int
    inner: int
    columns: int
    learns: bool = True

    @property
    def forward(self) -> int:
        """Operations of the forward pass."""
        return 2 * self.rows * self.inner * self.columns

    @property
    def training(self) -> int:
        """Operations of forward and backward pass."""
        return self.forward * (3 if self.learns else 2)


def parameters(config: BrainloomConfig) -> dict[str, int]:
    """Parameters of the core by part; the unit table lies outside."""
    width, row, inner = config.hidden_size, config.unit_embed_size, config.intermediate_size
    head = width // config.num_attention_heads
    attention, mlp = 4 * width**2 + 3 * head, 3 * width * inner
    patches = (config.frames_per_patch * config.patch_size**2 + 1 + width) * 2 * width + config.num_patches * width
    readout = row * width * config.num_readouts + (width + 1) * config.num_readouts + width * NUM_MOMENTS * NUM_OWN
    channels = config.population_channels
    population = width * channels + NUM_AROUND * channels * width + 3 * width + NUM_BLOCKS * (mlp + width)
    samples = (config.samples_per_token + NUM_SUMS) * width
    latents = (config.latents_per_step + row) * width  # what is learned of a step, and how a session's row adds to it
    return {
        "identity": (config.num_unit_features + 1) * row + row**2 + row * width + len(MODALITIES) * width,
        "encoder": attention + mlp + patches + samples + latents + 3 * width,  # a null key and two norms
        "trunk": config.num_hidden_layers * (attention + mlp + 2 * width) + width,
        "decoder": 2 * attention + mlp + readout + population + 8 * width,  # two embeddings and six norms
    }


def products(config: BrainloomConfig, shape: Shape) -> dict[str, list[Product]]:
    """Every matrix product of one sample, by part."""
    width, row, sources = config.hidden_size, config.unit_embed_size, shape.sources
    steps, times = (round(shape.context_s * hz) for hz in (config.latent_hz, config.readout_hz))
    latents, patches = steps * config.latents_per_step, shape.frames * config.num_patches
    keys, views = 1 + shape.tokens + patches, 1 + shape.folds
    square = [(latents, width, width)] * 2 + [(1 + sources + patches, width, width), (sources, width, width)]
    return {
        "identity": [
            Product(sources, config.num_unit_features, row, learns=False),
            Product(sources, row, row),
            Product(sources, row, width),
        ],
        "encoder": [
            Product(shape.tokens, config.samples_per_token + NUM_SUMS, width, learns=False),
            Product(patches, config.frames_per_patch * config.patch_size**2, 2 * width, learns=False),
            Product(patches, 2 * width, width),
            *(Product(*sizes) for sizes in square),  # queries and output, keys, gates
            Product(1, row, width),
            *_reading(config, latents, keys),
            *_mlp(config, latents),
        ],
        "trunk": config.num_hidden_layers
        * [*(Product(latents, width, width),) * 4, *_reading(config, latents, latents), *_mlp(config, latents)],
        "decoder": [
            *(Product(times, width, width),) * 2,
            *(Product(latents, width, width),) * 2,
            *_reading(config, times, latents),
            *_mlp(config, times),
            *(Product(times, width, width),) * 2,
            *(Product(1 + patches, width, width),) * 2,
            *_reading(config, times, 1 + patches),
            Product(sources, width, config.population_channels),
            Product(times * NUM_AROUND, sources, views * config.population_channels, learns=False),
            Product(views * times, NUM_AROUND * config.population_channels, width),
            Product(2 * times, sources, views, learns=False),
            Product(views * times, 2, width, learns=False),
            *NUM_BLOCKS * [*_mlp(config, views * times)],
            *(Product(sources, part, config.num_readouts * width) for part in trait_parts(config)),
            Product(sources * config.num_readouts, 3 * width, times),
            Product(sources * config.num_readouts, width, shape.folds * times),
            Product(sources, width, config.num_readouts),
            Product(sources, width, NUM_MOMENTS * NUM_OWN),
            Product(sources * NUM_MOMENTS, NUM_OWN, times, learns=False),
        ],
    }


def _reading(config: BrainloomConfig, queries: int, keys: int) -> Iterator[Product]:
    """Scores and sums of attention, all heads together; a local mask hides, and saves nothing."""
    yield Product(queries, config.hidden_size, keys)
    yield Product(queries, keys, config.hidden_size)


def _mlp(config: BrainloomConfig, rows: int) -> Iterator[Product]:
    for _ in range(3):
        yield Product(rows, config.hidden_size, config.intermediate_size)


def forward_flops(config: BrainloomConfig, shape: Shape) -> dict[str, int]:
    """Operations of a forward pass by part."""
    return {part: shape.batch * sum(p.forward for p in made) for part, made in products(config, shape).items()}


def training_flops(config: BrainloomConfig, shape: Shape) -> dict[str, int]:
    """Operations of a forward and backward pass by part, without what gradient checkpointing repeats."""
    return {part: shape.batch * sum(p.training for p in made) for part, made in products(config, shape).items()}


def fullest_shape(run: RunConfig, config: BrainloomConfig, batch: int = 1) -> Shape:
    """A batch in which every unit is visible all the time, and the stimulus: no mask family sees more."""
    tokens = round(run.data.max_units * run.data.context_s * TOKENS_PER_S)
    return Shape(
        batch=batch,
        sources=run.data.max_units,
        tokens=tokens,
        frames=run.data.max_frames,
        context_s=run.data.context_s,
        folds=max(num_folds(turn.mix) for turn in run.turns),
        queries=min(run.data.max_queries, tokens),
    )
