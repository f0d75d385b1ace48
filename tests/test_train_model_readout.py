"""Readouts: calcium as a leaky integral, and frames whose order says nothing.

In: drawn rates and frames. Out: integrals against the recurrence step by step, patches against a shuffle.
"""

import pytest
import torch
from train_builders import TINY, tiny_run

from train.build import build_model
from train.model.configuration_brainloom import BrainloomConfig
from train.model.readout_brainloom import DECAY_S, BrainloomReadout, leaky_integral, trait_parts
from train.model.stimulus_brainloom import BrainloomPatches, in_order_of_time


@pytest.mark.parametrize("num_times", [1, 2, 3, 37, 64])
def test_the_integral_is_the_recurrence(num_times: int) -> None:
    chance = torch.Generator().manual_seed(num_times)
    x = torch.randn(2, 3, num_times, generator=chance, dtype=torch.float64)
    keep = torch.rand(2, 3, 1, generator=chance, dtype=torch.float64)
    steps = [x[..., 0]]
    for t in range(1, num_times):
        steps.append(keep[..., 0] * steps[-1] + (1 - keep[..., 0]) * x[..., t])
    torch.testing.assert_close(leaky_integral(x, keep), torch.stack(steps, -1))


def test_only_what_leaks_is_integrated_with_its_decay() -> None:
    config = BrainloomConfig(**TINY, likelihoods={"traces": "calcium"})
    readout = BrainloomReadout(config)
    with torch.no_grad():
        readout.decay_proj.weight.zero_()
        readout.decay_proj.bias.zero_()
    features, identity, traits = torch.randn(1, 20, 96), torch.randn(1, 2, 32), torch.randn(1, 2, 16)
    leaks = torch.tensor([[True, False]])
    leaked, plain = readout(features, identity, traits, leaks), readout(features, identity, traits, ~leaks)
    assert torch.equal(leaked[..., :-1], plain[..., :-1])
    growth = torch.expm1(3 * torch.tanh(plain[0, 0, :, -1] / 3))
    keep = torch.full((1, 1, 1), -1 / (config.readout_hz * DECAY_S)).exp()
    torch.testing.assert_close(leaked[0, 0, :, -1], leaky_integral(growth[None, None], keep)[0, 0])
    assert not torch.allclose(leaked[0, 1, :, -1], plain[0, 1, :, -1])


@pytest.mark.parametrize("size", [16, 18])
def test_each_kind_of_features_is_read_by_traits_of_its_own(size: int) -> None:
    config = BrainloomConfig(**{**TINY, "unit_embed_size": size})
    readout, leaks = BrainloomReadout(config), torch.zeros(1, 2, dtype=torch.bool)
    features, identity, traits = torch.randn(1, 20, 96), torch.randn(1, 2, 32), torch.randn(1, 2, size)
    parts = trait_parts(config)
    assert sum(parts) == size
    for kind in range(3):
        moved, others = traits.split(parts, -1), features.unflatten(-1, (3, 32)).clone()
        others[:, :, kind] = 0.0
        changed = torch.cat([part + (number == kind) for number, part in enumerate(moved)], -1)
        assert not torch.allclose(
            readout(features, identity, traits, leaks), readout(features, identity, changed, leaks)
        )
        silent = others.flatten(2)
        assert torch.equal(readout(silent, identity, traits, leaks), readout(silent, identity, changed, leaks))


def test_a_model_without_calcium_has_no_decays() -> None:
    assert "readout.decay_proj.weight" not in dict(build_model(tiny_run()).named_parameters())


def test_frames_are_told_apart_by_their_times_not_by_their_order() -> None:
    chance = torch.Generator().manual_seed(0)
    patches = BrainloomPatches(BrainloomConfig(**TINY))
    pixels, times = torch.randn(2, 6, 24, 24, generator=chance), torch.linspace(0, 1, 6).expand(2, -1)
    mask = torch.tensor([[True] * 6, [True, False, True, True, False, True]])
    order = torch.randperm(6, generator=chance)
    straight = in_order_of_time(pixels, times, mask)
    shuffled = in_order_of_time(pixels[:, order], times[:, order], mask[:, order])
    for a, b in zip(straight, shuffled, strict=True):
        assert torch.equal(a[straight[2]], b[shuffled[2]]), "what is visible comes out the same"
    assert straight[2].tolist() == [[True] * 6, [True] * 4 + [False] * 2]
    assert torch.equal(patches(straight[0], straight[2])[0], patches(shuffled[0], shuffled[2])[0])


def test_a_patch_holds_the_frames_before_it() -> None:
    patches = BrainloomPatches(BrainloomConfig(**TINY, frames_per_patch=2))
    pixels, mask = torch.zeros(1, 4, 24, 24), torch.ones(1, 4, dtype=torch.bool)
    silent = patches(pixels, mask)[0].unflatten(1, (4, 4))
    pixels[0, 1] = 1.0
    changed = (patches(pixels, mask)[0].unflatten(1, (4, 4)) - silent).abs().sum((2, 3))[0]
    assert changed[0] == 0 and changed[1] > 0 and changed[2] > 0 and changed[3] == 0
