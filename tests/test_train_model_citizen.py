"""A good citizen of transformers: loads without garbage, says how large it is, compiles once.

In: tiny models, saved, broken, compiled. Out: the same weights and predictions; graphs counted.
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train_builders import SESSIONS, batch_of, moved_model, one_window, reader_of, tiny_run, tiny_store
from transformers.utils.generic import ModelOutput

from train.build import build_model
from train.config import FAMILIES, Family, ModelConfig, RunConfig
from train.dataset import WindowReader
from train.masking import draw_mask
from train.model.modeling_brainloom import BrainloomForPreTraining, BrainloomModel

RUN = tiny_run()
ONE_LAYER = replace(RUN, model=ModelConfig(overrides={**RUN.model.overrides, "num_hidden_layers": 1}))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> WindowReader:
    return reader_of(tiny_store(tmp_path_factory.getbasetemp()), RUN)


def batch(
    reader: WindowReader, run: RunConfig = RUN, family: Family = "inpainting", session: str = "full", seed: int = 0
) -> dict[str, Tensor]:
    """A window of a session under a mask of a family."""
    context_s = run.data.context_s
    window = one_window(reader, session, 3.0 + 0.2 * seed, context_s)
    mask = draw_mask(family, window.tokens, context_s, np.random.default_rng(seed))
    return batch_of(reader, run, family, [(window, mask)])


# ---------------------------------------------------------------- loading


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that a model holds: parameters, buffers that are saved or not, plain attributes."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, module in model.named_modules():
        found |= {f"{name}.{key}": value for key, value in vars(module).items() if isinstance(value, Tensor)}
    return found


def test_no_tensor_is_garbage_after_loading(tmp_path: Path) -> None:
    """transformers builds on the meta device: what is neither saved nor initialised again would be anything."""
    model = moved_model(RUN)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == tensors(model).keys(), "all that the model holds is saved: there is nothing to refill"
    again = tensors(BrainloomForPreTraining.from_pretrained(tmp_path))
    assert again.keys() == saved.keys() and all(torch.equal(again[name], saved[name]) for name in saved)


def test_initialisation_reaches_every_parameter() -> None:
    model = build_model(RUN)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.apply(model._init_weights)
    left = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    assert left == []


@pytest.mark.parametrize("missing", ["decoder.time_embed", "model.encoder.time_bias", "readout.bias_proj.bias"])
def test_what_a_file_lacks_is_initialised_and_the_rest_is_loaded(tmp_path: Path, missing: str) -> None:
    model = moved_model(RUN)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    lacking = {name: tensor for name, tensor in saved.items() if name != missing}
    save_file(lacking, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = BrainloomForPreTraining.from_pretrained(tmp_path)
    assert again.get_parameter(missing).isfinite().all()
    assert not torch.equal(again.get_parameter(missing), saved[missing])
    assert all(torch.equal(again.get_parameter(name), tensor) for name, tensor in lacking.items())


def test_the_trunk_alone_is_loaded_from_the_whole(tmp_path: Path, reader: WindowReader) -> None:
    model, inputs = moved_model(RUN), batch(reader)
    model.save_pretrained(tmp_path)
    trunk = BrainloomModel.from_pretrained(tmp_path).eval()
    inputs = {name: tensor for name, tensor in inputs.items() if not name.startswith(("query", "label", "source_null"))}
    own = model.model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in trunk.state_dict().items())
    for parameter in trunk.parameters():  # the file's tensors lie at odd addresses: products add up in another order
        parameter.data = parameter.data.clone()
    with torch.inference_mode():
        loaded, kept = (m(**inputs).last_hidden_state for m in (trunk, model.model))
    assert torch.equal(loaded, kept)


def test_a_configuration_survives_the_road_to_the_hub(tmp_path: Path) -> None:
    overrides = {**RUN.model.overrides, "likelihoods": {"traces": "student_t"}, "local_window_s": 0.5}
    config = build_model(replace(RUN, model=ModelConfig(overrides=overrides))).config
    config.save_pretrained(tmp_path)
    again = type(config).from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict() and again.num_patches == 4
    assert json.loads((tmp_path / "config.json").read_text())["likelihoods"]["traces"] == "student_t"


# ---------------------------------------------------------------- what the library asks of a model


def test_outputs_are_typed_and_may_be_tuples(reader: WindowReader) -> None:
    with torch.inference_mode():
        output = moved_model(RUN)(**batch(reader), coverage=0.5)
    fields = set(type(output).__dataclass_fields__)
    assert isinstance(output, ModelOutput) and set(output) == fields - {"left_out"}, "no source has a fold"
    assert output.to_tuple()[0] is output.loss and output["predictions"] is output.predictions


@pytest.mark.parametrize("whole", [True, False])
def test_input_embeddings_are_the_projection_of_samples(whole: bool) -> None:
    model = moved_model(RUN) if whole else moved_model(RUN).model
    embeddings = model.get_input_embeddings()
    assert embeddings is model.base_model.encoder.value_proj and model.get_output_embeddings() is None
    other = nn.Linear(embeddings.in_features, embeddings.out_features, bias=False)
    model.set_input_embeddings(other)
    assert model.base_model.encoder.value_proj is other
    model.enable_input_require_grads()
    model.disable_input_require_grads()


def test_parameters_of_the_core_are_told_by_part() -> None:
    model = moved_model(RUN)
    parts = model.core_parameters()
    assert sum(parts.values()) == model.num_parameters() and min(parts.values()) > 0
    assert parts["trunk"] == sum(p.numel() for p in [*model.model.layers.parameters(), *model.model.norm.parameters()])
    assert model.model.core_parameters() == {**parts, "decoder": 0}


# ---------------------------------------------------------------- compiling


def shapes(inputs: dict[str, Tensor]) -> tuple[Any, ...]:
    return tuple(tuple(tensor.shape) for tensor in inputs.values())


def test_one_graph_for_each_family_and_context_and_never_another(reader: WindowReader) -> None:
    """Full graphs of forward and loss; a graph break, or a second graph for the same shapes, is an error."""
    graphs: Counter[str] = Counter()

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs["compiled"] += 1
        return graph.forward

    model = moved_model(ONE_LAYER).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counting, fullgraph=True, dynamic=False)
    known: set[Any] = set()
    with torch._dynamo.config.patch(recompile_limit=16):
        for step in range(50):
            context_s = (1.0, 2.0)[step // 5 % 2]
            run = replace(ONE_LAYER, data=replace(RUN.data, context_s=context_s))
            family, session = FAMILIES[step % 5], SESSIONS[step % 3 if step < 25 else 3 - step % 3]
            inputs = batch(reader, run, family, session, seed=step)
            known.add((context_s, shapes(inputs)))
            loss = compiled(**inputs, context_s=context_s).loss
            assert loss.isfinite()
            assert graphs["compiled"] == len(known), f"step {step}: {family} of {context_s} s, session {session}"
    assert graphs["compiled"] <= 2 * len(FAMILIES)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # of torch itself, when it compiles
def test_compiled_is_eager(reader: WindowReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # else processes of torch's outlive the test
    model, inputs = moved_model(ONE_LAYER), batch(reader)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    with torch.no_grad():
        expected, actual = model(**inputs), compiled(**inputs)
    for name in ("predictions", "log_scale", "loss", "last_hidden_state"):
        assert (actual[name] - expected[name]).abs().max() < 1e-5
