"""Sizes and costs by formula: the same as those of the model that is built, and as the configurations say.

In: every preset on the meta device, where nothing is computed. Out: parameters and operations, counted and by formula.
"""

import re
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from train_builders import ROOT

from train.build import model_config
from train.config import PRESETS, load
from train.flops import (
    BYTES,
    PARTS,
    Shape,
    activation_bytes,
    forward_flops,
    fullest_shape,
    main,
    parameters,
    state_bytes,
    summary,
    training_flops,
)
from train.model.configuration_brainloom import BrainloomConfig
from train.model.modeling_brainloom import BrainloomForPreTraining

SHAPE = Shape(batch=2, sources=300, tokens=4000, frames=8, context_s=2.0)
CONFIGS = sorted((ROOT / "train" / "configs").glob("*.yaml"))


def arguments(config: BrainloomConfig, shape: Shape, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A batch of zeros, on the device of the context."""
    batch, sources, tokens, frames, queries = (shape.batch, shape.sources, shape.tokens, shape.frames, 64)
    samples = config.samples_per_token
    sizes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "unit_embeds": (dtype, (sources, config.unit_embed_size)),
        "unit_features": (dtype, (sources, config.num_unit_features)),
        "source_modality": (torch.int64, (sources,)),
        "source_null": (torch.float32, (sources,)),
        "input_values": (dtype, (tokens, samples)),
        "input_observed": (torch.bool, (tokens, samples)),
        "input_source": (torch.int64, (tokens,)),
        "input_time_s": (torch.float32, (tokens,)),
        "input_start_s": (torch.float32, (tokens,)),
        "input_sample_s": (torch.float32, (tokens,)),
        "input_mask": (torch.bool, (tokens,)),
        "pixels": (dtype, (frames, *config.image_size)),
        "frame_time_s": (torch.float32, (frames,)),
        "frame_mask": (torch.bool, (frames,)),
        "query_source": (torch.int64, (queries,)),
        "query_time_s": (torch.float32, (queries,)),
        "query_sample_s": (torch.float32, (queries,)),
        "labels": (torch.float32, (queries, samples)),
        "label_mask": (torch.bool, (queries, samples)),
    }
    made = {name: torch.zeros(batch, *size, dtype=kind) for name, (kind, size) in sizes.items()}
    made["unit_embeds"].requires_grad_()
    return made


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
    parts = Counter({"identity": total["model.identity"], "encoder": total["model.encoder"] + total["model.patches"]})
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
    for changed in ({"batch": 3}, {"sources": 900}, {"tokens": 50}, {"frames": 40}, {"context_s": 7.0}):
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


@pytest.mark.parametrize("precision", BYTES)
@pytest.mark.parametrize("changed", [{}, {"sources": 400, "tokens": 3000}, {"context_s": 4.0}, {"frames": 8}], ids=str)
def test_activations_are_about_what_autograd_keeps(precision: str, changed: dict[str, int]) -> None:
    config = BrainloomConfig(**PRESETS["debug"])
    shape = Shape(**{"batch": 2, "sources": 100, "tokens": 1000, "frames": 1, "context_s": 2.0, **changed})
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    model = BrainloomForPreTraining(config).to(dtype)
    inputs = arguments(config, shape, dtype)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(**inputs, context_s=shape.context_s)
    assert activation_bytes(config, shape, precision) == pytest.approx(sum(s.nbytes() for s in kept.values()), rel=0.2)


def test_states_are_sixteen_bytes_a_parameter_over_all_ranks() -> None:
    config = BrainloomConfig(**PRESETS["20m"])
    assert state_bytes(config, "bf16", 4) == 4 * sum(parameters(config).values())


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_header_of_a_preset_says_what_it_is_for_and_what_it_needs(path: Path) -> None:
    """Numbers in the header are those of the formulas; what to write there is in the message."""
    comment = [line[2:] for line in path.read_text().splitlines() if line.startswith("# ")]
    text = re.sub(r"\s+", " ", " ".join(comment))
    assert text.startswith(f"{path.stem}: ") and "Hardware: " in text
    if path.stem not in PRESETS:
        return
    run = load(path)
    assert run.model.preset == path.stem
    assert f"make train RUN=train/configs/{path.name} STORE=store OUT=runs/{path.stem}" in text
    said = re.search(
        rf"By formula \(python -m train\.flops train/configs/{path.name} --gpus (\d+)\), with everything", text
    )
    assert said is not None
    expected = summary(run, int(said[1]))
    assert expected in text, "the header should say:\n" + textwrap.indent(
        "\n".join(textwrap.wrap(expected, 112)), "#   "
    )


def test_every_preset_has_its_configuration() -> None:
    assert set(PRESETS) <= {path.stem for path in CONFIGS}


def test_the_fullest_batch_has_every_unit_at_every_moment() -> None:
    run = load(ROOT / "train" / "configs" / "1b.yaml")
    shape = fullest_shape(run, model_config(run), 3)
    assert (shape.batch, shape.sources, shape.tokens, shape.context_s) == (3, 4096, 4096 * 20, 2.0)


def test_the_command_prints_every_part(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "train" / "configs" / "300m.yaml"
    monkeypatch.setattr("sys.argv", ["flops", str(path), "--gpus", "16"])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:6]] == [*PARTS, "all"] and lines[6] == summary(load(path), 16)
    numbers = [[float(cell.replace(",", "")) for cell in line.split()[1:]] for line in lines[1:6]]
    np.testing.assert_allclose(np.sum(numbers[:4], axis=0), numbers[4], rtol=1e-6)
