"""Held-out evaluation: the scores equal formulas written down again, references are found by time, rows are complete.

In: a moved model on a tiny store, references made up for it. Out: rows, and predictions from which they follow.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import xlogy
from store_builders import target, write_plan
from train_builders import batch_of, handmade_run, moved_trained, one_window, tiny_run, tiny_session, tiny_store

from prep import catalog
from train import evaluate
from train.checkpoint import CheckpointError
from train.dataset import UNKNOWN_HZ
from train.evaluate import References, Row, num_without_scale, table
from train.masking import TASKS, Mask, Task, task_mask
from train.metrics import deviance_explained, deviances
from train.trained import Trained, load_trained

RUN = tiny_run()
SECOND_NS = 1_000_000_000
KEYS = {"modality", "task", "visible", "deviance_explained", "ceiling", "ceiling_kind", "fraction_of_ceiling"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def trained(store: Path) -> Trained:
    return moved_trained(store, RUN)


def index_of(trained: Trained, session_id: str) -> int:
    return [entry["session_id"] for entry in trained.store.entries].index(session_id)


def reference(trained: Trained, session_id: str, stream: str, task: Task, seed: int = 0) -> dict[str, Any]:
    """A reference row for every sample of a stream, in physical units, of made-up numbers."""
    opened = trained.store.session(index_of(trained, session_id)).stream(stream)
    spec = opened.spec
    start_ns = (opened.start_ns[:, None] + np.arange(spec.samples_per_token) * spec.sample_ns).reshape(-1)
    values = np.random.default_rng(seed).gamma(2.0, 1.0, (len(start_ns), spec.num_sources))
    row = {"stream": stream, "modality": task.modality, "task": task.family, "visible": list(task.visible)}
    return {**row, "ceiling_kind": "exact", "start_ns": start_ns, "values": values.astype(np.float32)}


def save(folder: Path, session_id: str, *rows: dict[str, Any]) -> None:
    """References as prep/ceiling.py writes them."""
    folder.mkdir(exist_ok=True)
    arrays: dict[str, Any] = {}
    index = []
    for number, row in enumerate(rows):
        index.append({**row, "start_ns": f"row{number}_start_ns", "values": f"row{number}_values"})
        arrays |= {f"row{number}_start_ns": row["start_ns"], f"row{number}_values": row["values"]}
    np.savez(folder / f"{session_id}.npz", allow_pickle=False, index=np.array(json.dumps(index)), **arrays)


def oracle(trained: Trained, row: dict[str, Any]) -> Any:
    """Predicts a stream's reference, whatever is visible."""

    def predict(windows: list[Any], masks: list[Mask]) -> list[Any]:
        result = []
        for window, mask in zip(windows, masks, strict=True):
            source = window.tokens.source[mask.asked]
            sample_ns = np.arange(window.values.shape[1]) * round(float(window.sample_s[mask.asked][0]) * 1e9)
            time_ns = window.token_ns[mask.asked][:, None] + sample_ns
            place = np.clip(np.searchsorted(row["start_ns"], time_ns), 0, len(row["start_ns"]) - 1)
            values = row["values"][place, window.sources.place[source][:, None]]
            if row["modality"] != "spikes":
                values = (values - window.sources.mean[source][:, None]) / window.sources.scale[source][:, None]
            result.append(values.astype(np.float32))
        return result

    return predict


# ---------------------------------------------------------------- scores


def test_deviance_explained_is_d2_for_counts_and_r2_for_values() -> None:
    chance = np.random.default_rng(0)
    rates, null = chance.gamma(2.0, 0.2, 500), np.full(500, 0.4)
    counts = chance.poisson(rates)

    def deviance(mu: Any) -> float:  # as in scikit-learn's mean_poisson_deviance
        return float(2 * np.mean(xlogy(counts, counts / mu) - counts + mu))

    assert deviance_explained("spikes", counts, rates, null) == pytest.approx(
        1 - deviance(rates) / deviance(null), rel=1e-12
    )
    values = chance.normal(size=500)
    means = 0.5 * values + 0.1
    r2 = 1 - ((values - means) ** 2).sum() / (values**2).sum()
    for modality in ("traces", "behavior"):
        assert deviance_explained(modality, values, means, np.zeros(500)) == pytest.approx(r2, rel=1e-12)


def test_the_null_explains_nothing_and_the_truth_everything() -> None:
    counts, null = np.array([0, 1, 3, 0]), np.full(4, 1.0)
    assert deviance_explained("spikes", counts, null, null) == 0
    assert deviance_explained("spikes", counts, counts.astype(float), null) == pytest.approx(1, abs=1e-8)
    assert deviance_explained("traces", counts, counts, null) == 1
    assert deviances("spikes", np.array([2]), np.array([2.0])) == 0
    assert deviances("behavior", np.ones(2), np.zeros(2)).sum() == 2


def test_where_the_null_has_no_deviance_there_is_nothing_to_explain() -> None:
    assert np.isnan(deviance_explained("traces", np.zeros(3), np.ones(3), np.zeros(3)))
    assert np.isnan(deviance_explained("spikes", np.ones(3), np.ones(3), np.ones(3)))


# ---------------------------------------------------------------- rows


def test_what_cannot_be_explained_is_null_in_json_and_a_dash_in_print() -> None:
    row = Row(TASKS[0], has_ceiling=False)
    row.parts.append({"truth": np.ones(3), "prediction": np.full(3, 0.9), "null": np.ones(3)})
    row.streams.add("spikes")
    summary = row.summary()
    assert summary["deviance_explained"] is None and "NaN" not in json.dumps(summary)
    assert table([summary]).splitlines()[1].split()[3:6] == ["-", "-", "-"]


@pytest.mark.parametrize("spikes", ["poisson", "negative_binomial"])
def test_of_a_session_that_is_held_out_whole_counts_are_predicted_and_scored(
    spikes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recording.txt").write_text("stands for an NWB file")
    for number, session_id in enumerate(("full", "imaging")):
        plan = tiny_session(tmp_path / "recording.txt", session_id, number)
        begin_ns = plan.splits[0][0]
        whole = ((begin_ns, begin_ns + 24 * SECOND_NS, "test"),)
        write_plan(replace(plan, splits=whole) if session_id == "full" else plan, target(tmp_path / "store", plan))
    catalog.write(tmp_path / "store")
    run = replace(RUN, model=replace(RUN.model, overrides={**RUN.model.overrides, "likelihoods": {"spikes": spikes}}))
    held_out = moved_trained(tmp_path / "store", run)
    sources = held_out.reader.sources(index_of(held_out, "full"))
    assert sources.mean[sources.modality == 0].tolist() == pytest.approx([UNKNOWN_HZ * 0.02] * 6)
    number = num_without_scale(sources)
    assert number == np.isin(sources.modality, (1, 2)).sum() > 0
    window = one_window(held_out.reader, "full")
    assert window.observed.any(1).tolist() == (window.tokens.modality == 0).tolist(), "what has no scale is missing"
    batch = batch_of(held_out.reader, run, "encoding", [(window, task_mask(TASKS[0], window.tokens, 1.0))])
    with torch.inference_mode():
        output = held_out.model(**batch)
    assert output.loss.isfinite() and (output.predictions[batch["label_mask"]] > 0).all()
    rows = evaluate.evaluate(held_out, "test", References(None), 3)
    assert {(row.task.modality, stream) for row in rows for stream in row.streams} >= {("spikes", "spikes")}
    full = index_of(held_out, "full")
    assert {row.task.modality for row in rows if (row.column("session") == full).any()} == {"spikes"}
    assert (
        f"full: the train split has nothing, or zeros alone, of {number} sources of traces" in capsys.readouterr().out
    )


def test_every_row_has_the_keys_on_which_checks_rely(trained: Trained) -> None:
    rows = [row.summary() for row in evaluate.evaluate(trained, "test", References(None), 3)]
    assert all(row.keys() >= KEYS for row in rows)
    assert {(row["modality"], row["task"], tuple(row["visible"])) for row in rows} == {
        (task.modality, task.family, task.visible) for task in TASKS if task.modality != "events"
    } - {("traces", "encoding", ("stimulus",))}, "imaging has behaviour: its stimulus is never alone"
    for row in rows:
        assert row["ceiling"] is None and row["fraction_of_ceiling"] is None and row["ceiling_kind"] == "null"
        assert np.isfinite(row["deviance_explained"]) and row["num_values"] > 0
    assert json.loads(json.dumps(rows)) == rows
    assert len(evaluate.table(rows).splitlines()) == len(rows) + 1


def test_a_task_is_asked_only_where_its_streams_are(trained: Trained) -> None:
    entries = {entry["session_id"]: entry for entry in trained.store.entries}
    asked = {
        name: {(task.modality, task.family, task.visible) for task in TASKS if evaluate.suits(task, entry)}
        for name, entry in entries.items()
    }
    assert ("spikes", "encoding", ("stimulus",)) in asked["still"] - asked["full"]
    assert ("spikes", "encoding", ("behavior", "stimulus")) in asked["full"] - asked["blind"] - asked["still"]
    assert ("behavior", "decoding", ("traces",)) in asked["imaging"] - asked["full"]
    assert not any(modality == "behavior" for modality, _, _ in asked["still"])


@pytest.mark.parametrize(
    ("session_id", "stream", "task"),
    [("full", "spikes", TASKS[0]), ("imaging", "dff", TASKS[5]), ("imaging", "pupil", TASKS[11])],
)
def test_whoever_predicts_the_reference_reaches_the_ceiling(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, session_id: str, stream: str, task: Task
) -> None:
    row = reference(trained, session_id, stream, task)
    save(tmp_path / "truth", session_id, row)
    monkeypatch.setattr(evaluate, "TASKS", (task,))
    monkeypatch.setattr(trained, "predict", oracle(trained, row))
    found = [r for r in evaluate.evaluate(trained, "test", References(tmp_path / "truth"), 4) if r.has_ceiling]
    assert len(found) == 1
    summary = found[0].summary()
    assert summary["streams"] == [stream] and summary["ceiling_kind"] == "exact"
    assert summary["deviance_explained"] == summary["ceiling"] and summary["fraction_of_ceiling"] == 1
    assert set(found[0].column("session").tolist()) == {index_of(trained, session_id)}


def test_columns_are_the_recorded_samples_and_no_others(trained: Trained) -> None:
    (row,) = [r for r in evaluate.evaluate(trained, "test", References(None), 4) if r.task == TASKS[1]]
    chosen = row.column("session") == index_of(trained, "blind")
    stream = trained.store.session(index_of(trained, "blind")).stream("spikes")
    bins = stream.read(slice(0, stream.spec.num_tokens)).transpose(0, 2, 1).reshape(-1, stream.spec.num_sources)
    place = (row.column("time_ns")[chosen] - stream.start_ns[0]) // stream.spec.sample_ns
    source = row.column("source")[chosen]
    np.testing.assert_array_equal(row.column("truth")[chosen], bins[place, source])
    np.testing.assert_array_equal(row.column("null")[chosen], stream.mean[source])
    assert len(set(zip(place.tolist(), source.tolist(), strict=True))) == chosen.sum(), "each sample once"
    start_ns, stop_ns = trained.store.session(index_of(trained, "blind")).splits("test")[0]
    assert (row.column("time_ns")[chosen] >= start_ns).all() and (row.column("time_ns")[chosen] < stop_ns).all()


def test_a_reference_is_found_by_task_and_by_time(trained: Trained, tmp_path: Path) -> None:
    row = reference(trained, "full", "spikes", TASKS[0])
    save(tmp_path / "truth", "full", row)
    references = References(tmp_path / "truth")
    found = references.find("full", "spikes", Task("spikes", "encoding", ("stimulus", "behavior")))
    assert found is not None and (found["values"] == row["values"]).all(), "the order of what is visible is free"
    assert references.find("full", "spikes", TASKS[1]) is None
    assert references.find("full", "heading", TASKS[0]) is None
    assert references.find("blind", "spikes", TASKS[0]) is None
    assert References(None).find("full", "spikes", TASKS[0]) is None


def test_a_reference_counts_for_the_nearest_sample_and_no_further() -> None:
    row = {"start_ns": np.array([100, 200, 300]), "values": np.array([[1.0, -1], [2, -2], [3, -3]])}
    times, place = np.array([100, 149, 151, 250, 300, 349, 351, 49]), np.array([0, 0, 0, 1, 1, 0, 0, 0])
    assert evaluate._at(row, times, place, 100).tolist()[:6] == [1, 1, 2, -3, -3, 3]
    assert np.isnan(evaluate._at(row, times, place, 100)[6:]).all()


# ---------------------------------------------------------------- the trained model and the command


def test_predictions_do_not_depend_on_the_company_of_a_window(trained: Trained) -> None:
    context_ns = SECOND_NS
    index = index_of(trained, "full")
    starts = evaluate.spread(trained, "test", index, 4)
    windows = [trained.reader.read(index, start, context_ns) for start in starts]
    masks = [task_mask(TASKS[0], window.tokens, 1.0) for window in windows]
    together = trained.predict(windows, masks)
    for window, mask, expected in zip(windows, masks, together, strict=True):
        (alone,) = trained.predict([window], [mask])
        assert alone.shape == expected.shape == (mask.asked.sum(), 8)
        assert np.abs(alone - expected).max() < 1e-5


def test_windows_of_an_evaluation_do_not_overlap_and_are_spread(trained: Trained) -> None:
    starts = evaluate.spread(trained, "train", 0, 4)
    assert len(starts) == 4 and min(np.diff(starts)) >= SECOND_NS
    begin_ns = trained.store.entries[0]["splits"][0][0]
    assert (starts[0], starts[-1]) == (begin_ns, begin_ns + 11 * SECOND_NS)
    assert len(evaluate.spread(trained, "valid", 0, 99)) == 3


def test_the_command_writes_what_the_table_follows_from(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = handmade_run(tmp_path / "run", store, RUN)
    parser = argparse.ArgumentParser()
    evaluate.configure(parser)
    assert evaluate.main(parser.parse_args([str(tmp_path / "run"), "--split", "test", "--windows", "2"])) == 0
    loaded = load_trained(tmp_path / "run")
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, expected.model.get_parameter(name))
    content = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert content["split"] == "test" and evaluate.table(content["tasks"]) in capsys.readouterr().out
    with np.load(tmp_path / "run" / "predictions.npz") as file:
        for i, row in enumerate(content["tasks"]):
            score = deviance_explained(row["modality"], *(file[f"{n}_{i}"] for n in ("truth", "prediction", "null")))
            assert score == row["deviance_explained"] and len(file[f"truth_{i}"]) == row["num_values"]


def test_a_run_without_a_checkpoint_says_what_to_do(store: Path, tmp_path: Path) -> None:
    handmade_run(tmp_path / "run", store, RUN)
    (tmp_path / "run" / "checkpoints" / "step-00000001" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has no sealed checkpoint \(1 damaged\). Train first: make train OUT="):
        load_trained(tmp_path / "run")
