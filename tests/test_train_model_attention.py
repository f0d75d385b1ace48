"""Attention: every implementation reads the same, memory is saved without a trace, windows have any length.

In: windows of a tiny store, models whose every parameter was moved. Out: predictions and gradients, compared.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from store_builders import target, write_plan
from torch import Tensor, nn
from torch.nn import functional as F
from train_builders import (
    SESSIONS,
    batch_of,
    moved_model,
    one_window,
    reader_of,
    tiny_run,
    tiny_session,
    tiny_store,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prep import catalog
from train.build import HALVED
from train.config import FAMILIES, Family, ModelConfig, RunConfig
from train.dataset import WindowReader
from train.masking import draw_mask
from train.model.attention_brainloom import local_mask, rotary_angles
from train.model.configuration_brainloom import BrainloomConfig
from train.model.modeling_brainloom import BrainloomForPreTraining, BrainloomLayer

RUN = tiny_run()
LOCAL = {"local_window_s": 0.25, "global_every": 2}
Batch = dict[str, Tensor]


def run_with(context_s: float = 1.0, **overrides: Any) -> RunConfig:
    """The tiny run with another model or window."""
    model = ModelConfig(overrides={**RUN.model.overrides, **overrides})
    return replace(RUN, model=model, data=replace(RUN.data, context_s=context_s))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> WindowReader:
    return reader_of(tiny_store(tmp_path_factory.getbasetemp()), RUN)


def batch(reader: WindowReader, family: Family = "inpainting", session: str = "full", context_s: float = 1.0) -> Batch:
    """Two windows with different masks."""
    run = run_with(context_s)
    windows = [one_window(reader, session, at_s, context_s) for at_s in (3.0, 7.0)]
    masks = [draw_mask(family, w.tokens, context_s, np.random.default_rng(i)) for i, w in enumerate(windows)]
    return batch_of(reader, run, family, list(zip(windows, masks, strict=True)))


def predict(model: BrainloomForPreTraining, inputs: Batch, **more: Any) -> Tensor:
    """Predictions (B, Q, P)."""
    with torch.inference_mode():
        predictions: Tensor = model(**inputs, **more).predictions
    return predictions


# ---------------------------------------------------------------- implementations


@pytest.mark.parametrize("overrides", [{}, LOCAL], ids=["global", "local"])
def test_eager_and_sdpa_agree(reader: WindowReader, overrides: dict[str, Any]) -> None:
    model = moved_model(run_with(**overrides))
    for family in FAMILIES:
        for session in SESSIONS:
            inputs = batch(reader, family, session)
            model.set_attn_implementation("sdpa")
            fast = predict(model, inputs)
            model.set_attn_implementation("eager")
            assert (predict(model, inputs) - fast).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # of torch itself, when it compiles
def test_flex_attention_agrees(reader: WindowReader) -> None:
    model, inputs = moved_model(run_with(**LOCAL)), batch(reader)
    fast = predict(model, inputs)
    model.set_attn_implementation("flex_attention")
    assert (predict(model, inputs) - fast).abs().max() < 1e-5


def implementation_of(name: str, seen: list[bool]) -> Any:
    """An attention function for the registry that notes whether it was given a mask."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
    ) -> tuple[Tensor, None]:
        assert more["dropout"] == 0 and not more["is_causal"] and module.config is not None, name
        seen.append(attention_mask is not None)
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=more["scaling"])
        return read.transpose(1, 2), None

    return attention


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[bool]]]:
    """Flash and sdpa replaced by functions that note their calls."""
    seen: dict[str, list[bool]] = {"flash_attention_2": [], "sdpa": []}
    for name, calls in seen.items():
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, implementation_of(name, calls))
    yield seen


def test_all_attention_goes_through_the_interface_of_transformers(
    reader: WindowReader, registry: dict[str, list[bool]]
) -> None:
    predict(moved_model(run_with(**LOCAL)), batch(reader))
    called = "encoder, a local and a global layer, decoder: latents, frames"
    assert registry["sdpa"] == [True, True, False, False, True], called


def test_flash_attention_is_given_what_has_no_mask(reader: WindowReader, registry: dict[str, list[bool]]) -> None:
    model, inputs = moved_model(run_with(**LOCAL)), batch(reader)
    before = predict(model, inputs)
    registry["sdpa"].clear()
    model.config._attn_implementation_internal = "flash_attention_2"  # as if its package were here
    assert (predict(model, inputs) - before).abs().max() < 1e-5
    assert registry == {"sdpa": [True, True, True], "flash_attention_2": [False, False]}


def test_half_precision_is_within_a_hundredth(reader: WindowReader) -> None:
    """Root mean square over all families and sessions, of the difference and of the predictions."""
    exact_model, half_model = moved_model(RUN), moved_model(RUN).bfloat16()
    squares = np.zeros(2)
    for family in FAMILIES:
        for session in SESSIONS:
            inputs = batch(reader, family, session)
            halves = {name: x.bfloat16() if name in HALVED else x for name, x in inputs.items()}
            exact, half = predict(exact_model, inputs), predict(half_model, halves)
            squares += [float((half - exact).square().sum()), float(exact.square().sum())]
    assert np.sqrt(squares[0] / squares[1]) < 1e-2


# ---------------------------------------------------------------- local and global layers


def test_a_local_layer_sees_what_is_near_in_time_and_a_global_one_everything() -> None:
    config = BrainloomConfig(hidden_size=32, num_attention_heads=2, intermediate_size=64, **LOCAL)
    config._attn_implementation = "sdpa"
    time_s = (torch.arange(20) // 2 + 0.5) / 10  # two latents at each of ten steps
    angles, near = rotary_angles(time_s[None], config), local_mask(time_s, config)
    x = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, 6] += 1  # at 0.35 s: seen from 0.15 to 0.55 s
    for index, reached in ((0, (time_s - 0.35).abs() < 0.25), (1, torch.ones(20, dtype=torch.bool))):
        layer = BrainloomLayer(config, index)
        nn.init.normal_(layer.self_attn.o_proj.weight)
        differs = (layer(x, angles, near) != layer(changed, angles, near)).any(-1)[0]
        assert torch.equal(differs, reached)


@pytest.mark.parametrize(
    ("overrides", "local"),
    [
        ({}, [False] * 6),
        ({"local_window_s": 1.0}, [True, True, True, False, True, True]),
        ({"local_window_s": 1.0, "global_every": 3}, [True, True, False, True, True, False]),
        ({"local_window_s": 1.0, "global_every": 1}, [False] * 6),
    ],
)
def test_every_nth_layer_is_global(overrides: dict[str, Any], local: list[bool]) -> None:
    config = BrainloomConfig(num_hidden_layers=6, **overrides)
    with torch.device("meta"):
        assert [layer.is_local for layer in BrainloomForPreTraining(config).model.layers] == local


@pytest.mark.parametrize("overrides", [{"local_window_s": 0.0}, {"global_every": 0}])
def test_a_pattern_that_is_none_is_refused(overrides: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"local_window_s .* must be more than 0 \(None: every layer is global\)"):
        BrainloomConfig(**overrides)


# ---------------------------------------------------------------- gradient checkpointing


@pytest.mark.parametrize("overrides", [{}, LOCAL], ids=["global", "local"])
def test_gradient_checkpointing_changes_no_bit(reader: WindowReader, overrides: dict[str, Any]) -> None:
    gradients = []
    for checkpointed in (False, True):
        model, inputs = moved_model(run_with(**overrides)).train(), batch(reader)
        if checkpointed:
            with pytest.warns(FutureWarning, match="activation_checkpointing_enable"):
                model.gradient_checkpointing_enable()
        assert model.is_activation_checkpointing == checkpointed
        saved = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(**inputs).loss
        loss.backward()
        gradients.append((saved, loss, [parameter.grad for parameter in model.parameters()]))
    (whole, loss, expected), (less, again, actual) = gradients
    assert less < 0.6 * whole, "activations are not kept"
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


# ---------------------------------------------------------------- time


def test_a_window_may_be_of_another_length_than_the_configuration_says(reader: WindowReader) -> None:
    """No parameter knows how long a window is."""
    inputs = batch(reader, context_s=2.0)
    short, long = moved_model(run_with(1.0)), moved_model(run_with(2.0))
    expected = predict(long, inputs)
    assert torch.equal(predict(short, inputs, context_s=2.0), expected)
    assert not torch.equal(predict(short, inputs), expected)
    for length_s, num_latents in ((1.0, 20), (60.0, 1200)):
        with torch.inference_mode():
            output = short(**inputs, context_s=length_s)
        assert output.last_hidden_state.shape[1] == num_latents and output.predictions.isfinite().all()


def test_a_window_too_short_for_a_step_is_refused(reader: WindowReader) -> None:
    for length_s in (0.0, 0.04):
        with pytest.raises(
            ValueError, match=rf"context_s = {length_s} holds no step of 10\.0 Hz\. Give at least 0\.1 s"
        ):
            predict(moved_model(RUN), batch(reader), context_s=length_s)


def test_when_a_session_was_recorded_has_no_meaning(tmp_path: Path) -> None:
    """The same session, 139 days into the clock and at its very start."""
    source = tmp_path / "recording.txt"
    source.write_text("stands for an NWB file")
    predictions = []
    for begin_s in (12_000_000.0, 0.0):
        root = tmp_path / f"store-{begin_s:.0f}"
        plan = tiny_session(source, "full", 0, begin_s)
        write_plan(plan, target(root, plan))
        catalog.write(root)
        predictions.append([predict(moved_model(RUN), batch(reader_of(root, RUN), family)) for family in FAMILIES])
    assert all(torch.equal(late, early) for late, early in zip(*predictions, strict=True))


def test_only_differences_of_times_are_read(reader: WindowReader) -> None:
    """Attention between all that stands on the rotary clock does not change when the clock is set."""
    config = moved_model(RUN).config
    layer = moved_model(RUN).model.layers[0]
    time_s = (torch.arange(20) + 0.5) / 20
    x = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        here, there = (layer(x, rotary_angles(time_s[None] + shift_s, config), None) for shift_s in (0.0, 40.0))
    assert (here - there).abs().max() < 1e-4
