"""Typed events in the model: counted in the bins of spikes, seen and asked as the masks say, a marked point process.

In: a hand-built session whose licks follow its spikes, with tones of the stimulus; another that lacks a type. Out:
counts, means, masks, predictions.
"""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from store_builders import target, write_plan
from train_builders import (
    SECOND_NS,
    arguments,
    moved_model,
    moved_trained,
    one_window,
    reader_of,
    tiny_run,
    tiny_session,
    tiny_store,
)

from prep import catalog
from prep.plan import PlannedStream, SessionPlan
from prep.settings import BIN_NS, EVENT_FIELDS, TOKEN_NS
from prep.store import Store, StreamSpec
from train import audit, event_counts, export, picture
from train.build import build_model, model_config
from train.config import FAMILIES, RunConfig
from train.dataset import Window, WindowReader, budget, make_sample
from train.evaluate import References, evaluate, suits
from train.loader import TrainingSamples, batches
from train.masking import BEHAVIOR, EVENTS, STIMULUS, TASKS, Task, TokenTable, draw_mask, task_mask
from train.model.likelihoods_brainloom import FAMILIES as LIKELIHOOD_FAMILIES
from train.model.likelihoods_brainloom import Readout
from train.model.processing_brainloom import EVENT_BINS, BrainloomProcessor, Stream
from train.trained import Trained, take_known_rows
from train.unit_table import UnitTable
from train.validation import Validation

RUN = tiny_run()
BEGIN_NS = 12_000_000 * SECOND_NS
DECODING = Task("events", "decoding", ("spikes",))
LICKS = {  # seconds after the session began, of each type
    "left": (3.0, 3.019, 3.02, 3.5, 7.0),  # two in the first bin, one in the second
    "right": (2.9999, 3.9999, 4.0, 13.0),  # the last one in the gap between two splits
}
TONES = {"tone": (3.25, 3.75, 15.0)}


class Fixed:
    """Reads values that are given."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def read(self, start: int, stop: int) -> Any:
        return self.values[start:stop]


def events(name: str, modality: Any, times_s: dict[str, Any], types: tuple[str, ...] = ()) -> PlannedStream:
    """A stream of events, in order of time."""
    types = types or tuple(sorted(times_s))
    rows = sorted((round(at * 1e9), types.index(type_)) for type_, times in times_s.items() for at in times)
    time_ns, code = np.array(rows, np.int64).reshape(-1, 2).T
    spec = StreamSpec(
        name=name,
        kind="event",
        modality=modality,
        num_tokens=len(rows),
        num_sources=1,
        samples_per_token=len(EVENT_FIELDS),
        duration_ns=1,
        sample_ns=1,
        channels=(name,),
        types=types,
        fields=EVENT_FIELDS,
    )
    reader = Fixed(np.full(spec.shape, np.nan, np.float32))
    return PlannedStream(spec=spec, start_ns=BEGIN_NS + time_ns, reader=reader, types=code.astype(np.int32))


def store_of(folder: Path, *plans: SessionPlan) -> Path:
    for plan in plans:
        write_plan(plan, target(folder / "store", plan))
    catalog.write(folder / "store")
    return folder / "store"


def with_events(folder: Path, session_id: str, *streams: PlannedStream) -> SessionPlan:
    recording = folder / "recording.txt"
    recording.write_text("stands for an NWB file")
    plan = tiny_session(recording, session_id, 0)
    return replace(plan, streams=(*plan.streams, *streams))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("events")
    licks, tones = events("licks", "behavior", LICKS), events("tones", "stimulus", TONES)
    fewer = events("licks", "behavior", {"right": (1.0, 5.0)})
    return store_of(folder, with_events(folder, "full", licks, tones), with_events(folder, "still", fewer))


@pytest.fixture
def reader(store: Path) -> WindowReader:
    return reader_of(store, RUN)


def counts_of(window: Window, reader: WindowReader, key: str) -> Any:
    """Counts (k, P) of one type in a window, by the key of its row."""
    (source,) = np.flatnonzero(window.sources.row == reader.source_table.keys.index(key))
    own = window.tokens.source == source
    assert np.array_equal(window.observed[own], np.arange(window.labels.shape[1]) < 5 * np.ones((own.sum(), 1)))
    return window.labels[own, :5]


# ---------------------------------------------------------------- reading


def test_events_are_counted_in_the_bins_of_spikes(reader: WindowReader) -> None:
    window = one_window(reader, "full", 3.0)
    left = np.zeros((10, 5))
    left[0, :2], left[5, 0] = (2, 1), 1  # an event on the edge of two bins belongs to the later one
    np.testing.assert_array_equal(counts_of(window, reader, "d1/licks/left"), left)
    right = np.zeros((10, 5))
    right[9, 4] = 1  # neither what came 0.1 ms before the window, nor what comes with its end
    np.testing.assert_array_equal(counts_of(window, reader, "d1/licks/right"), right)
    is_event = window.tokens.modality == EVENTS
    spikes = np.unique(window.token_ns[window.tokens.modality == 0])
    np.testing.assert_array_equal(np.unique(window.token_ns[is_event]), spikes)
    np.testing.assert_allclose(window.tokens.stop_s[is_event] - window.tokens.start_s[is_event], 0.1)


def test_means_are_of_the_train_split_and_never_zero(reader: WindowReader) -> None:
    keys, sources = reader.source_table.keys, reader.sources(0)
    mean = {keys[row]: m for row, m in zip(sources.row, sources.mean, strict=True)}
    num_bins = 12 * SECOND_NS / BIN_NS
    assert mean["d1/licks/left"] == pytest.approx(5 / num_bins) and mean["d1/licks/right"] == pytest.approx(
        3 / num_bins
    )
    assert mean["d1/tones/tone"] == pytest.approx(2 / num_bins)
    own = sources.modality == EVENTS
    np.testing.assert_allclose(sources.scale[own] ** 2, sources.mean[own], rtol=1e-6)
    after_all = BEGIN_NS + 13 * SECOND_NS, BEGIN_NS + 23 * SECOND_NS, "train"
    _, (left, right) = event_counts.read_types(reader.store.session(0).stream("licks"), [after_all])
    assert left == pytest.approx(0.5 / 500) and right == pytest.approx(1 / 500), "left: as if half an event had come"


def test_a_session_has_the_sources_of_its_own_types_and_shares_their_rows(reader: WindowReader) -> None:
    keys = reader.source_table.keys
    of = [[keys[row] for row in reader.sources(i).row[reader.sources(i).modality == EVENTS]] for i in (0, 1)]
    assert of == [["d1/licks/left", "d1/licks/right", "d1/tones/tone"], ["d1/licks/right"]]
    assert reader.source_table.channel_keys[-3:] == of[0] and len(keys) == len(set(keys))


def test_what_lies_outside_the_splits_is_missing(reader: WindowReader) -> None:
    window = one_window(reader, "full", 11.55)
    for source in np.flatnonzero(window.sources.modality == EVENTS):
        observed = window.observed[window.tokens.source == source][:, :5].reshape(50)
        assert observed.tolist() == [True] * 22 + [False] * 28, "bins of 20 ms that end by 12 s"


def test_of_too_many_types_the_most_frequent_are_read_and_that_is_said(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_counts, "MAX_TYPES", 1)
    reader = reader_of(store, RUN)
    with pytest.warns(UserWarning, match=r"has 2 types of events; the 1 most frequent .* 3 of its 8 events .* are not"):
        window = one_window(reader, "full", 3.0)
    assert counts_of(window, reader, "d1/licks/left").sum() == 4
    assert reader.source_table.keys.index("d1/licks/right") not in window.sources.row


@pytest.mark.parametrize("family", FAMILIES)
def test_every_event_fits_the_budget(reader: WindowReader, family: str) -> None:
    window = one_window(reader, "full", 3.0)
    shape = budget(reader.store, replace(RUN.data, max_queries=10_000), family)
    mask = draw_mask(family, window.tokens, 1.0, np.random.default_rng(0))
    sample = make_sample(window, mask, shape)
    assert shape.num_sources >= len(window.sources.row)
    assert sample["input_mask"].sum() == mask.visible.sum()
    assert sample["label_mask"].any(1).sum() == (window.observed & mask.asked[:, None]).any(1).sum()


# ---------------------------------------------------------------- masks


def some_tokens() -> TokenTable:
    """A unit, running, a lick, a tone: one token each."""
    modality, start_s = np.array([0, BEHAVIOR, EVENTS, EVENTS]), np.zeros(4)
    return TokenTable(modality, np.arange(4), start_s, start_s + 0.1, np.array([False, False, False, True]))


@pytest.mark.parametrize(
    ("task", "visible"),
    [
        (TASKS[0], [False, True, True, True]),
        (TASKS[1], [False, True, True, False]),
        (TASKS[2], [False, False, False, True]),
        (TASKS[4], [True, False, False, False]),
        (DECODING, [True, False, False, False]),
    ],
)
def test_licks_are_seen_with_behaviour_and_tones_with_the_stimulus(task: Task, visible: list[bool]) -> None:
    mask = task_mask(task, some_tokens(), 1.0)
    assert mask.visible.tolist() == visible
    assert mask.asked[2:].tolist() == [task == DECODING] * 2 and not mask.asked[1]


def test_in_training_events_are_asked_like_behaviour_and_never_seen_beside_activity_alone() -> None:
    for seed in range(8):
        masks = {f: draw_mask(f, some_tokens(), 1.0, np.random.default_rng(seed)) for f in FAMILIES}
        assert masks["decoding"].asked.tolist() == [False, True, True, True]
        for family in ("forecasting", "co_smoothing", "decoding"):
            assert not masks[family].visible[1:].any()
        encoding = masks["encoding"]
        assert encoding.visible.tolist() == [False, True, True, encoding.frames] and not encoding.asked[1:].any()
        assert (masks["inpainting"].visible == ~masks["inpainting"].asked).all()


def test_tasks_of_events_suit_sessions_that_have_them(reader: WindowReader, tmp_path_factory: Any) -> None:
    entries = {entry["session_id"]: entry for entry in reader.store.entries}
    assert DECODING in TASKS and suits(DECODING, entries["full"]) and suits(DECODING, entries["still"])
    assert suits(TASKS[1], entries["still"]), "licks are behaviour"
    assert not suits(Task("behavior", "decoding", ("spikes",)), entries["still"]), "but no trace of it"
    without = Store(tiny_store(tmp_path_factory.getbasetemp())).entries
    assert not any(suits(task, entry) for task in TASKS if task.modality == "events" for entry in without)


@pytest.fixture
def trained(store: Path) -> Trained:
    return moved_trained(store, RUN)


def test_the_audit_finds_no_leak_of_events(trained: Trained) -> None:
    tasks = [DECODING, TASKS[0], TASKS[4]]
    rows = [*audit.audit_tasks(trained, "valid", 2, 2, tasks), *audit.audit_training(trained, ["encoding", "decoding"])]
    assert audit.failures(rows) == [] and {row.check for row in rows} >= {"noise", "future", "clock", "order", "seen"}


def test_the_audit_finds_events_of_the_stimulus_that_are_seen_with_behaviour(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def everything_is_behaviour(tokens: TokenTable) -> Any:
        return np.where(tokens.modality == EVENTS, BEHAVIOR, tokens.modality)

    monkeypatch.setattr("train.masking.seen_with", everything_is_behaviour)
    rows = list(audit.audit_tasks(trained, "valid", 2, 1, [TASKS[1]]))
    assert {"mask", "noise"} <= {row.check for row in rows if row.failed}
    assert "full/tones" in audit.failures(rows)[0]


# ---------------------------------------------------------------- likelihood


def test_nats_are_those_of_a_marked_point_process() -> None:
    """-log of prod over events of l_i(t) times exp(-integral of all l), against that of the null's intensities."""
    rates_hz = torch.tensor([[0.5, 2.0, 4.0], [1.0, 0.25, 3.0]], dtype=torch.float64)  # of two types in three bins
    null_hz = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    bin_s = 0.02
    happened = [(0, 1), (0, 1), (1, 2)]  # type, bin: two of a type in one bin

    def nll(hz: torch.Tensor) -> torch.Tensor:
        return hz.sum() * bin_s - sum(hz[type_, bin_].log() for type_, bin_ in happened)

    expected = nll(rates_hz) - nll(null_hz.expand(2, 3))
    total = rates_hz.sum(0)  # the same by parts: when (the sum of hazards), and what (the share of each)
    when = total.sum() * bin_s - sum(total[bin_].log() for _, bin_ in happened)
    what = -sum((rates_hz[type_, bin_] / total[bin_]).log() for type_, bin_ in happened)
    assert float(when + what) == pytest.approx(float(nll(rates_hz)))
    counts = torch.zeros(2, 3, dtype=torch.float64)
    for type_, bin_ in happened:
        counts[type_, bin_] += 1
    growth = (rates_hz / null_hz).log()
    zero = torch.zeros_like(growth)
    readout = Readout(6.0 * torch.atanh(growth / 6.0), zero, zero, zero, null_hz * bin_s, 6.0)
    nats = LIKELIHOOD_FAMILIES["point_process"].excess_nats(counts, readout)
    assert float(nats.sum()) == pytest.approx(float(expected), rel=1e-9)


def test_the_model_answers_for_events_and_its_loss_counts_them(reader: WindowReader) -> None:
    window = one_window(reader, "full", 3.0)
    mask = task_mask(DECODING, window.tokens, 1.0)
    batch = arguments(reader, RUN, [make_sample(window, mask, budget(reader.store, RUN.data, "decoding"))])
    with torch.inference_mode():
        output = moved_model(RUN)(**batch)
    source = batch["query_source"][0][batch["label_mask"][0].any(-1)]
    assert output.num_values.tolist() == [[0, 0, 0, 150]] and output.nats[0, 3] != 0 and len(source) == 30
    assert (output.predictions[0, :30, :5] > 0).all()
    weight = model_config(RUN).modality_weights["events"]
    assert float(output.loss) == pytest.approx(weight * float(output.nats[0, 3]) / 150, rel=1e-5)


def test_an_outsider_gets_the_same_predictions_and_what_comes_next(trained: Trained) -> None:
    window = one_window(trained.reader, "full", 3.0)
    mask = task_mask(DECODING, window.tokens, 1.0)
    raw = export.raw_window(trained, window, mask)
    processor: BrainloomProcessor = export.processor(trained)
    assert {"d1/full/licks/left", "d1/full/tones/tone", "d1/still/licks/right"} <= set(processor.unit_keys)
    streams = [a_stream(raw, number) for number in range(int(raw["num_streams"]))]
    inputs = processor(streams, session=raw["session"].tolist())
    with torch.inference_mode():
        predictions = trained.model(**inputs).predictions
    (expected,) = trained.predict([window], [mask])
    assert (predictions[0] - torch.from_numpy(expected)).abs().max() < 1e-5
    keys = [key for stream in streams for key in stream.keys]
    assert torch.equal(processor.physical(predictions, inputs["query_source"], keys), predictions), "counts are counts"
    assert predictions.shape[2] > event_counts.BINS == EVENT_BINS, (
        "the model answers for more samples than a token of events has"
    )
    following = processor.next_event(predictions, inputs)
    assert following.of_type_in_step.shape == (1, 3, 50)
    none = torch.exp(-predictions[..., : event_counts.BINS].sum())
    torch.testing.assert_close(following.of_type.sum() + none, torch.ones(()))


def a_stream(raw: dict[str, Any], number: int) -> Stream:
    """A stream of an export's raw window."""
    return Stream(
        keys=[str(key) for key in raw[f"keys_{number}"]],
        modality=str(raw[f"modality_{number}"]),
        sample_s=float(raw[f"sample_s_{number}"]),
        **{name: raw[f"{name}_{number}"] for name in ("values", "start_s", "offset_s", "visible", "asked")},
    )


def test_a_type_of_events_is_known_in_another_session_by_its_name(trained: Trained) -> None:
    processor = export.processor(trained)
    keys = ["d1/licks/left", "d2/licks/right", "d2/licks/none"]
    table = UnitTable(keys, model_config(RUN).unit_embed_size, torch.device("cpu"))
    unknown, matched = take_known_rows(table, set(keys), processor)
    assert unknown.tolist() == [False, False, True] and len(matched) == 2
    assert torch.equal(table.weight[0], processor.units["weight"][processor.unit_keys.index("d1/full/licks/left")])


def test_events_are_scored_while_a_run_goes_on_as_they_are_in_evaluation_and_drawn(trained: Trained) -> None:
    def predict(batch: dict[str, torch.Tensor], context_s: float) -> torch.Tensor:
        left_out = {"labels", "label_mask", "unit_rows"}
        embeds = trained.table.lookup(batch["unit_rows"]).detach()
        with torch.no_grad():
            output = trained.model(unit_embeds=embeds, **{n: x for n, x in batch.items() if n not in left_out})
        predictions: torch.Tensor = output.predictions
        return predictions

    run = replace(RUN, validate_every=1, validate_windows=2)
    scores = Validation(trained.store, run).score(predict, torch.device("cpu"))["scores"]
    (score,) = [row for row in scores if row["of"] == "all" and row["modality"] == "events"]
    rows = [row for row in evaluate(trained, "valid", References(None), 2) if row.task == DECODING]
    (row,) = [row.summary() for row in rows]
    assert score["num_values"] == row["num_values"] == 2 * 4 * 50 and row["streams"] == ["licks", "tones"]
    assert score["deviance_explained"] == pytest.approx(row["deviance_explained"], abs=1e-5)
    assert set(rows[0].column("null")) == set(
        np.concatenate([trained.reader.sources(i).mean[trained.reader.sources(i).modality == EVENTS] for i in (0, 1)])
    )
    drawn = picture.figure(trained, "test", 2)
    assert drawn is not None
    assert any(axis.get_title().startswith("events: decoding from spikes") for axis in drawn.axes)


# ---------------------------------------------------------------- learning


def licks_after_bursts(folder: Path) -> Path:
    """Three of six units burst for 0.4 s now and then; licks come at 10 Hz while they do."""
    chance = np.random.default_rng(0)
    on = np.zeros(240, np.bool_)
    for first in range(3, 236, 12):
        on[first + chance.integers(0, 6) :][:4] = True
    rate = np.where(on[:, None], np.array([1.5] * 3 + [0.2] * 3), 0.1)
    counts = chance.poisson(rate[..., None], (240, 6, 5)).astype(np.uint8)
    plan = with_events(folder, "still", events("licks", "behavior", {"lick": np.flatnonzero(on) * 0.1 + 0.05}))
    spikes = replace(plan.streams[0], reader=Fixed(counts))
    return store_of(folder, replace(plan, streams=(spikes, *plan.streams[1:])))


@pytest.fixture
def learning() -> Iterator[RunConfig]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run = tiny_run(num_steps=60, families=("decoding",), global_batch_size=8, micro_batch_size=8, unit_dropout=0.0)
    yield run
    torch.set_num_threads(threads)


def test_licks_that_follow_spikes_are_decoded_from_held_out_time(tmp_path: Path, learning: RunConfig) -> None:
    torch.manual_seed(0)
    store, model = licks_after_bursts(tmp_path), build_model(learning)
    samples = TrainingSamples(str(store), learning, model.config)
    reader = reader_of(store, learning)
    table = UnitTable(reader.source_table.keys, model.config.unit_embed_size, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    feed, nats = batches(samples, 0, 0, 1), []
    for batch in (next(feed) for _ in range(learning.train.num_steps)):
        output = model(unit_embeds=table.lookup(batch.pop("unit_rows")), **batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        table.step(0.01)
        nats.append(float(output.nats[:, 3].detach().sum() / output.num_values[:, 3].sum()))
    feed.close()
    assert np.mean(nats[-10:]) < np.mean(nats[:3]) - 0.01
    rows = evaluate(Trained(learning, reader.store, model.eval(), table, reader), "test", References(None), 4)
    (row,) = [row.summary() for row in rows if row.task == DECODING]
    assert row["deviance_explained"] > 0.1 and row["streams"] == ["licks"]


def test_a_store_without_events_is_read_as_before(tmp_path_factory: pytest.TempPathFactory) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reader = reader_of(tiny_store(tmp_path_factory.getbasetemp()), RUN)
        window = one_window(reader, "full")
    assert not (window.tokens.modality == EVENTS).any() and not window.sources.of_stimulus.any()
    assert STIMULUS not in window.tokens.modality and TOKEN_NS == 5 * BIN_NS
