"""Sizes and operations by formula: the same as those of the model that is built.

In: every preset on the meta device, where nothing is computed. Out: parameters and operations, counted and by formula.
"""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from train_builders import ROOT

from train.activations import arguments
from train.build import model_config
from train.config import PRESETS, load
from train.flops import PARTS, Shape, forward_flops, fullest_shape, parameters, training_flops
from train.model.configuration_brainloom import BrainloomConfig
from train.model.modeling_brainloom import BrainloomForPreTraining

SHAPE = Shape(batch=2, sources=300, tokens=4000, frames=8, context_s=2.0, queries=64)


def counted(config: BrainloomConfig, shape: Shape, training: bool = False) -> dict[str, int]:
    """Operations of the model that is built, by part as torch counts them."""
    with torch.device("meta"):
        model, inputs = BrainloomForPreTraining(config), arguments(config, shape)
        with FlopCounterMode(display=False) as counter:
            loss = model(**inputs, context_s=shape.context_s).loss
            if training:
                loss.backward()
    total = {name.removeprefix("BrainloomForPreTraining."): sum(c.values()) for name, c in counter.flop_counts.items()}
    if training:
        return {"all": total["Global"]}
    encoder = sum(total[f"model.{name}"] for name in ("encoder", "patches", "session_proj"))
    parts = Counter({"identity": total["model.identity"], "encoder": encoder})
    parts["decoder"] = total["decoder"] + total["readout"]
    parts["trunk"] = total["model"] - parts["identity"] - parts["encoder"]
    return parts


# ---------------------------------------------------------------- against the model that is built


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_those_of_the_built_model(preset: str) -> None:
    config = BrainloomConfig(**PRESETS[preset])
    with torch.device("meta"):
        built = BrainloomForPreTraining(config).core_parameters()
    assert parameters(config) == pytest.approx(built, rel=0.02) and tuple(built) == PARTS
    assert sum(parameters(config).values()) == pytest.approx(sum(built.values()), rel=0.02)


@pytest.mark.parametrize("preset", PRESETS)
def test_operations_are_those_of_the_built_model(preset: str) -> None:
    config = BrainloomConfig(**PRESETS[preset])
    assert forward_flops(config, SHAPE) == pytest.approx(counted(config, SHAPE), rel=0.02)
    training = sum(training_flops(config, SHAPE).values())
    assert training == pytest.approx(counted(config, SHAPE, training=True)["all"], rel=0.02)


def test_operations_follow_every_size_of_a_batch() -> None:
    config = BrainloomConfig(**PRESETS["debug"], latents_per_step=8, samples_per_token=8, patch_size=12)
    for changed in ({"batch": 3}, {"sources": 900}, {"tokens": 50}, {"frames": 40}, {"context_s": 7.0}, {"folds": 4}):
        shape = Shape(**{**vars(SHAPE), **changed})
        assert forward_flops(config, shape) == pytest.approx(counted(config, shape), rel=0.02)


def test_the_trunk_of_the_largest_model_has_a_billion_parameters() -> None:
    assert 0.95e9 < parameters(BrainloomConfig(**PRESETS["1b"]))["trunk"] < 1.1e9


def test_presets_are_as_large_as_their_names_say() -> None:
    for name, size in (("debug", 2e6), ("20m", 20e6), ("80m", 80e6), ("300m", 300e6), ("1b", 1e9)):
        assert sum(parameters(BrainloomConfig(**PRESETS[name])).values()) == pytest.approx(size, rel=0.3)


def test_the_cost_is_linear_in_the_number_of_visible_tokens() -> None:
    """Up to 4,096 units of 20 tokens; what is not linear is constant, so that the fitted exponent is below 1."""
    config = BrainloomConfig(**PRESETS["debug"])
    units = [64, 128, 256, 512, 1024, 2048, 4096]
    costs = []
    for number in units:
        shape = Shape(sources=number, tokens=20 * number, frames=0, context_s=2.0)
        costs.append(sum(counted(config, shape).values()))
    steps = np.diff(costs)
    np.testing.assert_allclose(steps[1:] / steps[:-1], 2, rtol=1e-6)
    exponent = np.polyfit(np.log(units), np.log(costs), 1)[0]
    assert 0.5 < exponent < 1.0


def test_the_fullest_batch_has_every_unit_at_every_moment() -> None:
    run = load(ROOT / "train" / "configs" / "1b.yaml")
    shape = fullest_shape(run, model_config(run), 3)
    assert (shape.batch, shape.sources, shape.tokens, shape.context_s) == (3, 4096, 4096 * 20, 2.0)
    assert (shape.frames, shape.queries) == (32, 16384)
