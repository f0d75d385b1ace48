"""The model: nothing hidden is seen, samples do not see each other, and what it starts from is its null.

In: windows of a tiny store under all five families. Out: predictions compared bit by bit.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from train_builders import (
    SESSIONS,
    arguments,
    batch_of,
    moved_model,
    one_window,
    reader_of,
    tiny_run,
    tiny_store,
)

from train.build import build_model
from train.config import FAMILIES, Family
from train.dataset import Budget, Window, WindowReader, budget, make_sample
from train.masking import Mask, draw_mask
from train.modalities import PREDICTED
from train.model.likelihoods_brainloom import sum_by_modality
from train.model.modeling_brainloom import BrainloomForPreTraining

RUN = tiny_run()
PAIRS = [(family, session) for family in FAMILIES for session in SESSIONS]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> WindowReader:
    return reader_of(tiny_store(tmp_path_factory.getbasetemp()), RUN)


@pytest.fixture(scope="module")
def model() -> BrainloomForPreTraining:
    return moved_model(RUN)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def masked(reader: WindowReader, family: Family, session: str, seed: int = 0) -> tuple[Window, Mask]:
    """A window of a session, and a mask of a family."""
    window = one_window(reader, session)
    return window, draw_mask(family, window.tokens, RUN.data.context_s, np.random.default_rng(seed))


def predict(model: BrainloomForPreTraining, batch: dict[str, Any]) -> Tensor:
    """Predictions (B, Q, P)."""
    predictions: Tensor = model(**batch).predictions
    return predictions


def asked(batch: dict[str, Any], sample: int = 0) -> int:
    """How many queries of a sample are no padding (its labels may be missing)."""
    return int((batch["label_mask"][sample].any(-1)).nonzero().max()) + 1


@pytest.mark.parametrize(("family", "session"), PAIRS)
def test_what_is_hidden_does_not_change_a_prediction_by_one_bit(
    reader: WindowReader, model: BrainloomForPreTraining, family: Family, session: str
) -> None:
    window, mask = masked(reader, family, session)
    before = predict(model, batch_of(reader, RUN, family, [(window, mask)]))
    assert before.isfinite().all()
    hidden = ~mask.visible
    spoilt = replace(
        window,
        values=np.where(hidden[:, None], np.nan, window.values).astype(np.float32),
        observed=window.observed | hidden[:, None],
        labels=np.full_like(window.labels, np.nan),
        pixels=window.pixels if mask.frames else np.full_like(window.pixels, np.nan),
    )
    assert torch.equal(predict(model, batch_of(reader, RUN, family, [(spoilt, mask)])), before)
    gone = replace(spoilt, observed=window.observed & ~hidden[:, None])
    assert torch.equal(predict(model, batch_of(reader, RUN, family, [(gone, mask)])), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_may_hold_anything(reader: WindowReader, model: BrainloomForPreTraining, family: Family) -> None:
    batch = batch_of(reader, RUN, family, [masked(reader, family, "full")])
    before = model(**batch)
    padding = ~batch["input_mask"]
    spoilt = {name: tensor.clone() for name, tensor in batch.items()}
    spoilt["input_values"][padding] = torch.nan
    for name in ("input_time_s", "input_start_s", "input_sample_s"):
        spoilt[name][padding] = torch.nan
    spoilt["input_observed"][padding] = True
    spoilt["pixels"][~batch["frame_mask"]] = torch.nan
    spoilt["frame_time_s"][~batch["frame_mask"]] = torch.nan
    spoilt["labels"][~batch["label_mask"]] = torch.nan
    after = model(**spoilt)
    assert torch.equal(after.predictions, before.predictions) and torch.equal(after.loss, before.loss)


def test_what_is_missing_spoils_no_gradient(reader: WindowReader) -> None:
    """A NaN that is masked after the arithmetic is 0 forward and NaN backward."""
    batch = batch_of(reader, RUN, "inpainting", [masked(reader, "inpainting", "full")])
    gradients = []
    for nothing in (0.0, torch.nan):
        spoilt = {name: tensor.clone() for name, tensor in batch.items()}
        spoilt["labels"][~batch["label_mask"]] = nothing
        spoilt["input_values"][~(batch["input_observed"] & batch["input_mask"][..., None])] = nothing
        spoilt["pixels"][~batch["frame_mask"]] = nothing
        with torch.inference_mode(False), torch.enable_grad():
            model = moved_model(RUN)
            model(**{name: tensor.clone() for name, tensor in spoilt.items()}).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for clean, missing in zip(*gradients, strict=True):
        assert clean is not None and clean.isfinite().all() and torch.equal(clean, missing)


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_samples_of_visible_tokens_may_hold_anything(
    reader: WindowReader, model: BrainloomForPreTraining, family: Family
) -> None:
    window, mask = masked(reader, family, "full")
    assert not window.observed[:, :5].all(), "the window has missing values"
    filled = replace(window, values=np.where(window.observed, window.values, 7).astype(np.float32))
    pair = [predict(model, batch_of(reader, RUN, family, [(w, mask)])) for w in (window, filled)]
    assert torch.equal(*pair)


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_of_a_batch_do_not_see_each_other(
    reader: WindowReader, model: BrainloomForPreTraining, family: Family
) -> None:
    first, second, other = (
        masked(reader, family, *which) for which in (("full", 0), ("blind", 1), ("still", 2))
    )  # masks are per sample
    together = predict(model, batch_of(reader, RUN, family, [first, second]))
    for place, pair in enumerate((first, second)):
        alone = predict(model, batch_of(reader, RUN, family, [pair]))[0]
        assert (together[place] - alone).abs().max() < 1e-5
    changed = predict(model, batch_of(reader, RUN, family, [other, second]))
    assert torch.equal(changed[1], together[1])
    assert not torch.equal(changed[0], together[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_sources_and_tokens_has_no_meaning(
    reader: WindowReader, model: BrainloomForPreTraining, family: Family
) -> None:
    batch = batch_of(reader, RUN, family, [masked(reader, family, "full")])
    chance = torch.Generator().manual_seed(1)
    sizes = {"source": 1, "input": 1, "query": 1}
    for name, of in (("source", "unit_features"), ("input", "input_mask"), ("query", "query_source")):
        sizes[name] = batch[of].shape[1]
    order = {name: torch.randperm(size, generator=chance) for name, size in sizes.items()}
    place = torch.argsort(order["source"])  # where each source went
    mixed = dict(batch)
    for name in ("unit_embeds", "unit_features", "source_modality", "source_null"):
        mixed[name] = batch[name][:, order["source"]]
    for name in [name for name in batch if name.startswith("input_")]:
        mixed[name] = batch[name][:, order["input"]]
    for name in ("query_source", "query_time_s", "query_sample_s", "labels", "label_mask"):
        mixed[name] = batch[name][:, order["query"]]
    mixed["input_source"], mixed["query_source"] = place[mixed["input_source"]], place[mixed["query_source"]]
    before, after = predict(model, batch), predict(model, mixed)
    assert (after - before[:, order["query"]]).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_more_padding_changes_nothing(reader: WindowReader, model: BrainloomForPreTraining, family: Family) -> None:
    window, mask = masked(reader, family, "full")
    small = budget(reader.store, RUN.data, family)
    large = Budget(small.num_sources + 5, small.num_inputs + 40, small.num_queries + 7, small.num_frames + 3)
    batches = [arguments(reader, RUN, [make_sample(window, mask, shape)]) for shape in (small, large)]
    before, after = (predict(model, batch)[0, : asked(batches[0])] for batch in batches)
    assert (before - after).abs().max() < 1e-5


def test_a_window_in_which_nothing_is_visible_is_predicted(
    reader: WindowReader, model: BrainloomForPreTraining
) -> None:
    window = one_window(reader, "full")
    nothing = Mask(np.zeros(len(window.values), np.bool_), np.ones(len(window.values), np.bool_), frames=False)
    output = model(**batch_of(reader, RUN, "inpainting", [(window, nothing)]))
    assert output.predictions.isfinite().all() and output.loss.isfinite()


def test_a_window_of_which_nothing_is_asked_costs_nothing(reader: WindowReader, model: BrainloomForPreTraining) -> None:
    window = one_window(reader, "still")
    mask = draw_mask("decoding", window.tokens, 1.0, np.random.default_rng(0))
    output = model(**batch_of(reader, RUN, "decoding", [(window, mask)]))
    assert not mask.asked.any() and float(output.loss) == 0


@pytest.mark.parametrize(("family", "session"), PAIRS)
def test_a_model_that_reads_nothing_out_predicts_its_null_and_its_loss_is_zero(
    reader: WindowReader, family: Family, session: str
) -> None:
    batch = batch_of(reader, RUN, family, [masked(reader, family, session)])
    with torch.inference_mode(False), torch.no_grad():
        model = build_model(RUN).eval()
        fresh = model(**batch)
        assert fresh.log_scale.abs().max() < 2  # it starts near its null
        for proj in model.readout.weight_projs:
            proj.weight.zero_()
    output = model(**batch)
    modality = batch["source_modality"].gather(1, batch["query_source"])
    null = torch.where(modality == 0, batch["source_null"].gather(1, batch["query_source"]), 0.0)
    torch.testing.assert_close(
        output.predictions, null[..., None].expand_as(output.predictions), rtol=1e-6, atol=0
    )  # exp(log x) is x to the last bit but one
    assert float(output.loss) == 0 and not output.nats.any()
    assert torch.equal(output.num_values.sum(1), batch["label_mask"].sum((1, 2)).float())


def test_weights_depend_on_seed_and_name_alone() -> None:
    first, again, other = (dict(build_model(replace(RUN, seed=seed)).named_parameters()) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_nats_are_summed_by_modality_over_what_was_observed() -> None:
    excess = torch.tensor([[[1.0, 2.0], [4.0, 8.0], [16.0, 32.0]]])
    mask = torch.tensor([[[True, False], [True, True], [False, True]]])
    nats, counts = sum_by_modality(excess, mask, torch.tensor([[0, 2, 0]]))
    assert nats.tolist() == [[33.0, 0.0, 12.0, 0.0]] and counts.tolist() == [[2.0, 0.0, 2.0, 0.0]]


def test_the_loss_weighs_modalities_by_their_own_number_of_values(
    reader: WindowReader, model: BrainloomForPreTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.config, "scale_tempering", 0.0)
    output = model(**batch_of(reader, RUN, "inpainting", [masked(reader, "inpainting", "full")]))
    weight = [model.config.modality_weights[name] for name in PREDICTED]
    nats, count = output.nats[0], output.num_values[0]
    expected = sum(w * float(n / c) for w, n, c in zip(weight, nats, count, strict=True) if c)
    assert float(output.loss) == pytest.approx(expected, rel=1e-6) and count[1] == 0 and count[0] and count[2]


def test_errors_weigh_as_squares_where_the_likelihood_is_tempered_in_full(reader: WindowReader) -> None:
    with torch.inference_mode(False), torch.enable_grad():
        model = moved_model(RUN)
        model.config.scale_tempering = 1.0
        batch = batch_of(reader, RUN, "decoding", [masked(reader, "decoding", "full")])
        output = model(**batch)
        (gradient,) = torch.autograd.grad(output.loss, model.readout.bias_proj.bias)
        error = torch.where(batch["label_mask"], output.predictions - batch["labels"].nan_to_num(), 0.0)
        expected = model.config.modality_weights["behavior"] * error.sum() / batch["label_mask"].sum()
    assert float(gradient[0]) == pytest.approx(float(expected), rel=1e-4)  # the first readout is the mean


def test_a_saved_model_is_loaded_bit_for_bit(model: BrainloomForPreTraining, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = BrainloomForPreTraining.from_pretrained(tmp_path)
    assert again.config.to_dict()["hidden_size"] == 32
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
