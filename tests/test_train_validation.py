"""Scores of a run that goes on: those of evaluation, for any number of ranks, and training notices nothing.

In: a tiny store, a moved model; real ranks with and without validation. Out: rows and losses, compared for equality.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from train_builders import losses, moved_trained, prepare_run, tiny_run, tiny_store, train_ranks, with_small_threshold

from prep.store import Store
from train import evaluate, validation
from train.config import ModelConfig, RunConfig
from train.engine import Engine
from train.metrics import VALIDATION, read_rows
from train.trained import Trained
from train.validation import Validation

RUN = replace(tiny_run(), validate_every=2, validate_windows=3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def trained(store: Path) -> Trained:
    return moved_trained(store, RUN)


def predictor(trained: Trained, calls: list[int] | None = None) -> validation.Predict:
    """What an engine does, by a plain model."""

    def predict(batch: dict[str, Tensor], context_s: float) -> Tensor:
        if calls is not None:
            calls.append(len(batch["input_mask"]))
        arguments = {name: x for name, x in batch.items() if name not in ("labels", "label_mask", "unit_rows")}
        embeds = trained.table.lookup(batch["unit_rows"]).detach()
        with torch.no_grad():
            predictions: Tensor = trained.model(unit_embeds=embeds, context_s=context_s, **arguments).predictions
        return predictions

    return predict


def of(rows: list[dict[str, Any]], kind: str) -> dict[tuple[str, ...], float]:
    """Scores of the whole, of sessions or of regions."""
    return {
        (row["modality"], row["task"], *row["visible"], row["name"]): row["deviance_explained"]
        for row in rows
        if row["of"] == kind
    }


def test_the_scores_are_those_of_evaluation_on_the_same_windows(trained: Trained) -> None:
    found = Validation(trained.store, RUN).score(predictor(trained), CPU)
    expected = [r.summary() for r in evaluate.evaluate(trained, "valid", evaluate.References(None), num_windows=3)]
    whole = of(found["scores"], "all")
    assert len(whole) == len(expected) == 11 and found["num_windows"] == 12
    for row in expected:
        score = whole[row["modality"], row["task"], *row["visible"], ""]
        assert score == pytest.approx(row["deviance_explained"], abs=1e-5)
    assert {row["num_values"] for row in found["scores"] if row["of"] == "all"} == {r["num_values"] for r in expected}


def test_sessions_and_regions_add_up_to_the_whole(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regions are given to units of one session: theirs and the nameless ones' values are all values."""
    text = ["VISp", "VISl", "VISp", "VISp", "CA1", "CA1"]
    store = trained.store
    first = store.session(0)
    monkeypatch.setattr(type(first), "text", lambda self, _: text[: self.entry["num_units"]])
    found = Validation(store, RUN).score(predictor(trained), CPU)["scores"]
    assert {row["name"] for row in found if row["of"] == "region"} == {"VISp", "VISl", "CA1"}
    assert {row["name"] for row in found if row["of"] == "session"} == {f"d1/{e['session_id']}" for e in store.entries}
    for kind in ("session", "region"):
        for modality, task in (("spikes", "encoding"), ("traces", "co_smoothing"), ("spikes", "forecasting")):
            counts = {
                of: sum(r["num_values"] for r in found if (r["of"], r["modality"], r["task"]) == (of, modality, task))
                for of in ("all", kind)
            }
            assert counts["all"] == counts[kind] > 0
    assert not [row for row in found if row["of"] == "region" and row["modality"] == "behavior"]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Be one rank of several; what ranks add up is added by hand."""

    def become(rank: int, num_ranks: int) -> None:
        monkeypatch.setattr(validation.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(validation.dist, "get_rank", lambda: rank)
        monkeypatch.setattr(validation.dist, "get_world_size", lambda: num_ranks)

    yield become
    monkeypatch.undo()


@pytest.mark.parametrize("num_ranks", [2, 3, 7])
def test_ranks_share_the_batches_evenly_and_their_sums_are_those_of_one(
    trained: Trained, pretend: Any, num_ranks: int
) -> None:
    alone = Validation(trained.store, RUN)._sums(predictor(trained), CPU)
    calls: list[list[int]] = [[] for _ in range(num_ranks)]
    total = np.zeros_like(alone)
    for rank in range(num_ranks):
        pretend(rank, num_ranks)
        total += Validation(trained.store, RUN)._sums(predictor(trained, calls[rank]), CPU)
    assert len({len(own) for own in calls}) == 1, "a rank that calls the model less often hangs the others"
    assert np.array_equal(total[:, 2], alone[:, 2]) and np.allclose(total, alone, rtol=1e-12, atol=0)


def test_a_window_shows_the_same_units_every_time(store: Path) -> None:
    few = replace(RUN, data=replace(RUN.data, max_units=2))
    first, second = (Validation(Store(store), few) for _ in range(2))
    for item in first._items:
        for _ in range(2):
            assert np.array_equal(first._read(item).sources.row, second._read(item).sources.row)
    assert {int((first._read(item).sources.modality < 2).sum()) for item in first._items} == {2}
    drawn = {tuple(first._read(item).sources.row[:2]) for item in first._items if item.session == 0}
    assert len(drawn) > 1, "another window shows other units"


def test_validation_is_due_every_so_often_and_at_the_end(store: Path) -> None:
    due = Validation(Store(store), replace(RUN, validate_every=4))
    assert [step for step in range(1, 11) if due.is_due(step)] == [4, 8, 10]
    assert not any(Validation(Store(store), replace(RUN, validate_every=0)).is_due(step) for step in range(1, 11))


def test_a_valid_split_that_is_too_short_for_a_window_is_not_validated(store: Path) -> None:
    long = replace(RUN, data=replace(RUN.data, context_s=8.0))
    assert not any(Validation(Store(store), long).is_due(step) for step in range(1, 11))


def test_each_batch_is_a_heart_beat_in_eval_mode_and_nothing_is_compiled_for_it() -> None:
    """Compiled for every shape that validation has, a run would compile for minutes, and then give up."""
    seen: list[Any] = []
    layer = torch.nn.Dropout(0.5)

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen.append("compiled")
        return graph.forward

    compiled = torch.compile(lambda x: layer(x) * 2, backend=backend)

    def forward(batch: dict[str, Tensor], context_s: float) -> SimpleNamespace:
        assert batch.keys() == {"x"}, "labels would compute a loss"
        return SimpleNamespace(predictions=compiled(batch["x"]))

    engine: Any = SimpleNamespace(
        deepspeed=layer,
        forward=forward,
        timer=SimpleNamespace(on_phase=seen.append),
        table=SimpleNamespace(discard=lambda: seen.append("discarded")),
    )
    batch = {"x": torch.ones(5), "labels": torch.ones(5)}
    assert torch.equal(Engine.predict(engine, batch, 1.0), torch.full((5,), 2.0))
    assert seen == ["validation", "discarded"] and layer.training
    compiled(torch.ones(5))
    assert seen[-1] == "compiled", "elsewhere it is"


# ---------------------------------------------------------------- real ranks


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """With dropout: a validation that drew from the source of chance, or left the model in the wrong mode, shows."""
    overrides = {**RUN.model.overrides, "hidden_dropout": 0.2}
    dropping = replace(RUN, train=replace(RUN.train, num_steps=5), model=ModelConfig(overrides=overrides))
    return with_small_threshold(dropping, tmp_path_factory.mktemp("ds"))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, store: Path, run: RunConfig) -> Path:
    """Two ranks with a validation after steps 2, 4 and 5."""
    out = prepare_run(tmp_path_factory.mktemp("two"), store, run)
    assert train_ranks(out) == 0
    return out


def test_training_with_and_without_validation_is_the_same_to_the_last_bit(
    two_ranks: Path, store: Path, run: RunConfig, tmp_path: Path
) -> None:
    """And with and without a trace."""
    out = prepare_run(tmp_path / "blind", store, replace(run, validate_every=0, profile_steps="3:5"))
    assert train_ranks(out) == 0
    assert losses(out) == losses(two_ranks) and not read_rows(out / VALIDATION)
    ours, theirs = (sorted((path / "checkpoints" / "step-00000005").glob("*.safetensors")) for path in (out, two_ranks))
    assert [path.name for path in ours] == [path.name for path in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, store: Path, run: RunConfig) -> Path:
    """The same steps on one rank, two of them traced and one counted."""
    out = prepare_run(tmp_path_factory.mktemp("one"), store, replace(run, profile_steps="1:3"))
    assert train_ranks(out, slots=1) == 0
    return out


def test_one_rank_has_the_losses_of_two_and_scores_as_they_do(two_ranks: Path, one_rank: Path) -> None:
    assert max(abs(a - b) for a, b in zip(losses(one_rank), losses(two_ranks), strict=True)) < 1e-5
    rows, expected = read_rows(one_rank / VALIDATION), read_rows(two_ranks / VALIDATION)
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == [2, 4, 5]
    for row, other in zip(rows, expected, strict=True):
        for kind in ("all", "session", "region"):
            scores, others = of(row["scores"], kind), of(other["scores"], kind)
            assert scores.keys() == others.keys()
            assert max(abs(scores[key] - others[key]) for key in scores) < 1e-5
    assert len({json.dumps(row["scores"]) for row in rows}) == 3, "scores that do not move would prove nothing"


def test_a_step_says_where_its_time_went(two_ranks: Path) -> None:
    for row in read_rows(two_ranks / "metrics.jsonl"):
        parts = [row[f"{name}_s"] for name in ("data_wait", "forward", "backward", "communication", "optimizer")]
        assert min(parts) > 0 and sum(parts) <= row["seconds"]
        assert sum(parts) > 0.8 * row["seconds"], "hardly anything is left over"
        assert row["gradient_norm"] > 0 and row["peak_memory_bytes"] > 1e8 and row["flops"] > 1e6
        assert "mfu" not in row, "nobody knows the peak of a CPU"


def test_a_profile_has_a_trace_and_the_operations_beside_the_formula(one_rank: Path) -> None:
    folder = one_rank / "profile"
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert sum("ProfilerStep" not in event["name"] for event in events if "name" in event) > 1000
    assert "Self CPU" in (folder / "operators.txt").read_text()
    flops = json.loads((folder / "flops.json").read_text())
    assert flops["step"] == 3 and 0.9 < flops["share"] < 1.1
    assert "GFLOP counted on this rank" in (one_rank / "logs" / "rank-00000.log").read_text()
