"""Odd recordings: without stimulus, without behaviour, of one unit, of no unit, with nothing recorded, nothing visible.

In: a store of odd sessions alone, and windows of it under all five families. Out: finite losses, and zeros where due.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from store_builders import target, write_plan
from train_builders import (
    batch_of,
    moved_model,
    moved_trained,
    one_window,
    reader_of,
    tiny_run,
    tiny_session,
)

from prep import catalog
from prep.plan import PlannedStream, SessionPlan
from train.audit import audit_tasks, audit_training, failures
from train.config import FAMILIES, Family
from train.dataset import Window, WindowReader, collate
from train.evaluate import References, evaluate
from train.loader import TrainingSamples
from train.masking import BEHAVIOR, EVENTS, SPIKES, TRACES, Mask, draw_mask
from train.model.modeling_brainloom import BrainloomForPreTraining

RUN = tiny_run()
ODD = ("blind", "still", "single", "alone", "lone-roi", "unrecorded", "pixels-only")
STREAMS = {  # what each session has; the others are those of the builders
    "single": ("spikes", "heading", "running", "movie"),  # one unit, with all that can be around it
    "alone": ("spikes",),  # one unit, and nothing around it
    "lone-roi": ("dff",),
    "unrecorded": ("spikes", "heading", "running", "movie"),  # every sample is missing
    "pixels-only": ("movie",),
}


def one_of(planned: PlannedStream, session_id: str) -> PlannedStream:
    """A stream of one source where its sources are units; of missing samples in the session where all are."""
    reader: Any = planned.reader
    if session_id == "unrecorded":
        return replace(planned, reader=replace(reader, missing_shard=(0, planned.spec.num_tokens)))
    if planned.spec.first_unit is None:
        return planned
    shape = (planned.spec.num_tokens, 1, planned.spec.samples_per_token)
    offset_ns = None if planned.offset_ns is None else planned.offset_ns[:1]
    spec = replace(planned.spec, num_sources=1)
    return replace(planned, spec=spec, reader=replace(reader, shape=shape), offset_ns=offset_ns)


def odd_session(source: Path, session_id: str, number: int) -> SessionPlan:
    if session_id not in STREAMS:
        return tiny_session(source, session_id, number)
    plan = tiny_session(source, "imaging" if session_id == "lone-roi" else "full", number)
    streams = tuple(one_of(item, session_id) for item in plan.streams if item.spec.name in STREAMS[session_id])
    num_units = sum(item.spec.num_sources for item in streams if item.spec.first_unit is not None)
    units = replace(
        plan.units,
        unit_key=[f"d1/{session_id}/{i}" for i in range(num_units)],
        kind=plan.units.kind[:num_units],
        region=plan.units.region[:num_units],
        quality=plan.units.quality[:num_units],
        xyz_um=plan.units.xyz_um[:num_units],
    )
    stimuli = plan.stimuli if "movie" in STREAMS[session_id] else ()
    return replace(plan, session_id=session_id, streams=streams, units=units, stimuli=stimuli)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    (folder / "recording.txt").write_text("stands for an NWB file")
    for number, session_id in enumerate(ODD):
        plan = odd_session(folder / "recording.txt", session_id, number)
        write_plan(plan, target(folder / "store", plan))
    catalog.write(folder / "store")
    return folder / "store"


@pytest.fixture(scope="module")
def reader(store: Path) -> WindowReader:
    return reader_of(store, RUN)


@pytest.fixture
def model() -> BrainloomForPreTraining:
    return moved_model(RUN)


def masked(reader: WindowReader, family: Family, session: str) -> tuple[Window, Mask]:
    window = one_window(reader, session)
    return window, draw_mask(family, window.tokens, RUN.data.context_s, np.random.default_rng(0))


def values_asked(window: Window, mask: Mask) -> list[int]:
    """Observed values among what is asked, by modality."""
    return [
        int(window.observed[mask.asked & (window.tokens.modality == kind)].sum())
        for kind in (SPIKES, TRACES, BEHAVIOR, EVENTS)
    ]


@pytest.mark.parametrize("session", ODD)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_odd_window_has_a_finite_loss_and_finite_gradients_and_zeros_for_what_it_has_not(
    reader: WindowReader, model: BrainloomForPreTraining, family: Family, session: str
) -> None:
    window, mask = masked(reader, family, session)
    output = model(**batch_of(reader, RUN, family, [(window, mask)]))
    assert output.loss.isfinite() and output.predictions.isfinite().all()
    expected = values_asked(window, mask)
    assert output.num_values[0].tolist() == expected
    assert [bool(nats) for nats in output.nats[0]] == [bool(number) for number in expected]
    output.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    if not sum(expected):  # nothing is asked, so nothing is learned
        assert output.loss.item() == 0 and not any(gradient.any() for gradient in gradients)


def test_what_odd_sessions_have(reader: WindowReader) -> None:
    """The cases are what they are called, or the tests above would show nothing."""
    windows = {session: one_window(reader, session) for session in ODD}
    kinds = {session: set(window.tokens.modality.tolist()) for session, window in windows.items()}
    assert kinds["blind"] == kinds["single"] == kinds["unrecorded"] == {SPIKES, BEHAVIOR}
    assert kinds["still"] == kinds["alone"] == {SPIKES} and kinds["lone-roi"] == {TRACES}
    assert not kinds["pixels-only"] and len(windows["pixels-only"].pixels)
    assert {session for session in ODD if not len(windows[session].pixels)} == {
        "blind",
        "alone",
        "lone-roi",
        "unrecorded",
    }
    for session in ("single", "alone", "lone-roi"):
        tokens = windows[session].tokens
        assert len(np.unique(tokens.source[tokens.modality != BEHAVIOR])) == 1
    assert not windows["unrecorded"].observed.any() and len(windows["unrecorded"].values)


@pytest.mark.parametrize("session", ["single", "alone", "lone-roi"])
def test_the_only_unit_is_hidden_in_co_smoothing_and_predicted_from_nothing(
    reader: WindowReader, model: BrainloomForPreTraining, session: str
) -> None:
    window, mask = masked(reader, "co_smoothing", session)
    assert not mask.visible.any() and mask.asked.sum() == 10
    other = replace(window, values=window.values + 1, labels=window.labels + 1)
    predictions = [
        model(**batch_of(reader, RUN, "co_smoothing", [(one, mask)])).predictions[0, :10] for one in (window, other)
    ]
    assert torch.equal(*predictions)


@pytest.mark.parametrize("family", FAMILIES)
def test_odd_company_changes_nothing_for_a_window(
    reader: WindowReader, model: BrainloomForPreTraining, family: Family
) -> None:
    pairs = [masked(reader, family, session) for session in ODD]
    together = model(**batch_of(reader, RUN, family, pairs))
    each = []
    for place, pair in enumerate(pairs):
        alone = model(**batch_of(reader, RUN, family, [pair]))
        torch.testing.assert_close(together.predictions[place], alone.predictions[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(together.nats[place], alone.nats[0], rtol=1e-5, atol=1e-4)
        each.append(alone.loss.item())
    assert together.loss.item() == pytest.approx(np.mean(each), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("session", ODD)
def test_a_window_in_which_nothing_is_visible_is_predicted_by_who_and_when_alone(
    reader: WindowReader, model: BrainloomForPreTraining, session: str
) -> None:
    window = one_window(reader, session)
    everything = np.ones(len(window.values), np.bool_)
    nothing = Mask(~everything, everything, frames=False)
    batch = batch_of(reader, RUN, "inpainting", [(window, nothing)])
    assert not batch["input_mask"].any() and not batch["frame_mask"].any()
    output = model(**batch)
    assert output.loss.isfinite() and output.predictions.isfinite().all()
    assert output.num_values[0].tolist() == values_asked(window, nothing)
    spoilt = {**batch, **{name: torch.full_like(batch[name], torch.nan) for name in ("input_values", "pixels")}}
    assert torch.equal(model(**spoilt).predictions, output.predictions)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_store_of_odd_sessions_alone_is_trained_on(
    store: Path, model: BrainloomForPreTraining, family: Family
) -> None:
    run = replace(RUN, train=replace(RUN.train, families=(family,)))
    samples = TrainingSamples(store, run, model.config)
    trained = moved_trained(store, run)
    for first in range(0, 32, 8):
        batch = collate([samples[position] for position in range(first, first + 8)])
        embeds = trained.table.lookup(batch.pop("unit_rows"))
        output = model(unit_embeds=embeds, **batch)
        assert output.loss.isfinite()
        output.loss.backward()
        trained.table.step(lr=0.1)
        assert trained.table.weight.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_store_of_odd_sessions_alone_is_evaluated_and_audited(store: Path) -> None:
    trained = moved_trained(store, RUN)
    rows = [row.summary() for row in evaluate(trained, "test", References(None), 2)]
    asked = {(row["modality"], row["task"], tuple(row["visible"])) for row in rows}
    assert {("spikes", "co_smoothing", ("spikes",)), ("spikes", "encoding", ("behavior", "stimulus"))} <= asked
    assert all(row["num_values"] > 0 and np.isfinite(row["deviance_explained"]) for row in rows)
    assert failures([*audit_tasks(trained, "valid", len(ODD), 2), *audit_training(trained)]) == []
