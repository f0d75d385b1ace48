"""The model of a run: its configuration, and weights that depend on (seed, name of the module) alone.

In: a run's configuration. Out: BrainloomForPreTraining, the same for any number of ranks, with ZeRO or without.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn

from train.config import PRESETS, RunConfig
from train.model.configuration_brainloom import BrainloomConfig
from train.model.modeling_brainloom import BrainloomForPreTraining

HALVED = ("input_values", "pixels", "unit_features", "unit_embeds")  # what comes in with the model's precision
Gather = Callable[[list[nn.Parameter]], AbstractContextManager[None]]


def model_config(config: RunConfig) -> BrainloomConfig:
    """The model's configuration: preset, then overrides, then what the data dictates."""
    values = {**PRESETS[config.model.preset], **config.model.overrides, "context_s": config.data.context_s}
    return BrainloomConfig(**values)


@contextlib.contextmanager
def whole(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Parameters that are not partitioned are whole as they are."""
    yield


def build_model(config: RunConfig, gather: Gather = whole) -> BrainloomForPreTraining:
    """The model with its seeded weights; `gather` makes partitioned parameters whole while they are set."""
    model = BrainloomForPreTraining(model_config(config))
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if own:
            digest = hashlib.sha256(f"{config.seed}/{name}".encode()).digest()
            with gather(own), torch.random.fork_rng(devices=[]):
                torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
                model._init_weights(module)
    return model
