"""The leak audit: a clean model passes, and every leak that is planted is caught, named, and fails the command.

In: a moved model on a tiny store, leaks planted in masks, samples, batches, clocks and the model. Out: rows that fail.
"""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_builders import handmade_run, moved_trained, one_window, tiny_run, tiny_store

from train import audit, audit_training
from train.audit import CHECKS, Row, failures, must_hide
from train.audit_training import TrainingBatches, chance_of_same, own_mask_share
from train.audit_windows import difference, shuffle, unshuffle
from train.build import build_model
from train.config import ALL_FAMILIES, FAMILIES, Family, Weights
from train.dataset import Budget, Window, WindowReader, collate, make_sample
from train.masking import BEHAVIOR, TASKS, Mask, TokenTable, draw_mask, is_activity, task_mask
from train.trained import Trained

RUN = tiny_run()
OF_TASKS = {"mask", "noise", "NaN", "other", "batch", "order", "padding", "clock", "seen"}
OF_TRAINING = (OF_TASKS - {"clock"}) | {"own"}
VALUES = {"noise", "NaN", "other"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.getbasetemp())


@pytest.fixture
def trained(store: Path) -> Trained:
    return moved_trained(store, RUN)


def of_tasks(trained: Trained, which: str = "", sessions: int = 2) -> list[Row]:
    """The rows of the tasks whose name begins so."""
    tasks = [task for task in TASKS if f"{task.modality} {task.family}".startswith(which)]
    return list(audit.audit_tasks(trained, "valid", sessions, 2, tasks))


def failed(rows: list[Row]) -> set[str]:
    """The checks that fail."""
    assert rows
    return {row.check for row in rows if row.failed}


def of_training(trained: Trained, family: Family) -> list[Row]:
    return list(audit.audit_training(trained, [family]))


# ---------------------------------------------------------------- clean


def test_a_clean_model_passes_every_check_of_every_task(trained: Trained) -> None:
    rows = of_tasks(trained, sessions=4) + list(audit.audit_training(trained))
    assert failures(rows) == [] and not any(row.failed for row in rows)
    # imaging has behaviour: its stimulus is never alone; no session has events
    suited = [task for task in TASKS if task != TASKS[7] and task.modality != "events"]
    names = [f"{task.modality} {task.family} | {'+'.join(task.visible)}" for task in suited]
    assert list(dict.fromkeys(row.task for row in rows)) == names + [f"training {family}" for family in ALL_FAMILIES]
    for name in {row.task for row in rows}:
        checks = {row.check for row in rows if row.task == name}
        expected = OF_TRAINING if name.startswith("training") else OF_TASKS
        expected = expected | ({"future"} if "forecasting" in name else set())
        expected = {"mask", "noise", "other", "seen"} if name == "training leave_out" else expected
        assert checks == expected - ({"own"} if name == "training decoding" else set()), name
        exact = [row.difference for row in rows if row.task == name and row.check in {"mask", "future", *VALUES}]
        assert set(exact) == {0.0}
    assert len(audit.table(rows).splitlines()) == 1 + len(names) + len(ALL_FAMILIES)


def test_a_model_that_follows_nothing_is_not_called_clean(trained: Trained) -> None:
    """A model that reads nothing out predicts its null whatever it is shown: that nothing changes shows nothing."""
    trained.model = build_model(RUN).eval()
    with torch.no_grad():
        for proj in trained.model.readout.weight_projs:
            proj.weight.zero_()
    rows = of_tasks(trained, "spikes")
    assert failed(rows) == {"seen"}
    assert failures(rows)[0] == (
        "BLIND spikes encoding | behavior+stimulus: predictions do not follow what is visible, so nothing is shown, "
        "noise in its place changes nothing. Look at whether the run has trained (metrics.jsonl)."
    )
    assert audit.table(rows).splitlines()[1].endswith(" BLIND")


# ---------------------------------------------------------------- leaks in masks


def shifted_by_a_token(mask: Mask, tokens: TokenTable) -> Mask:
    """What is visible is found one token late."""
    return replace(mask, visible=np.roll(mask.visible, 1))


def shifted_by_a_token_of_each_source(mask: Mask, tokens: TokenTable) -> Mask:
    """Visible is what was visible of the same source 0.1 s before, and what is asked stays asked."""
    visible = [
        ((tokens.source == source) & (np.abs(tokens.start_s - (start_s - 0.1)) < 1e-6) & mask.visible).any()
        for source, start_s in zip(tokens.source, tokens.start_s, strict=True)
    ]
    return replace(mask, visible=mask.visible | np.array(visible, np.bool_))


def all_visible(mask: Mask, tokens: TokenTable) -> Mask:
    return Mask(np.ones_like(mask.visible), mask.asked, frames=True)


def behaviour_visible(mask: Mask, tokens: TokenTable) -> Mask:
    return replace(mask, visible=mask.visible | (tokens.modality == BEHAVIOR))


def stimulus_visible(mask: Mask, tokens: TokenTable) -> Mask:
    return replace(mask, frames=True)


Change = Callable[[Mask, TokenTable], Mask]


def plant(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Every mask that is drawn is changed: those of evaluation, and those of training."""
    monkeypatch.setattr(
        audit.masking, "task_mask", lambda task, tokens, context_s: change(task_mask(task, tokens, context_s), tokens)
    )
    monkeypatch.setattr(
        "train.loader.draw_mask", lambda family, tokens, *more: change(draw_mask(family, tokens, *more), tokens)
    )


@pytest.mark.parametrize(
    ("change", "task", "family"),
    [
        (shifted_by_a_token, "spikes forecasting", "inpainting"),
        (shifted_by_a_token, "spikes co_smoothing", "co_smoothing"),
        (shifted_by_a_token, "behavior decoding", "decoding"),
        (shifted_by_a_token, "spikes encoding", "encoding"),
        (shifted_by_a_token_of_each_source, "spikes forecasting", "inpainting"),
        (shifted_by_a_token_of_each_source, "traces forecasting", "forecasting"),
        (all_visible, "traces co_smoothing", "co_smoothing"),
        (behaviour_visible, "spikes co_smoothing", "co_smoothing"),
        (behaviour_visible, "spikes forecasting", "forecasting"),
        (stimulus_visible, "spikes co_smoothing", "inpainting"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_mask_that_shows_what_its_task_hides_is_caught(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, change: Change, task: str, family: Family
) -> None:
    plant(monkeypatch, change)
    assert failed(of_tasks(trained, task)) >= {"mask", *VALUES}
    if change is not stimulus_visible:  # the samples of these families have no room for frames; in-painting sees them
        assert failed(of_training(trained, family)) >= {"mask", *VALUES}


def test_what_a_wrong_mask_shows_is_named(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, behaviour_visible)
    lines = failures(of_tasks(trained, "spikes co_smoothing"))
    assert len(lines) == 2
    assert re.fullmatch(
        r"LEAK spikes co_smoothing \| spikes: the mask shows what the task hides, \d+ values are shown that must be "
        r"hidden \(first source 0 of blind/heading at 0.000 s of its window\). Look at task_mask in train/masking.py.",
        lines[0],
    )
    assert re.fullmatch(
        r"LEAK spikes co_smoothing \| spikes: predictions follow hidden values, by up to inf \(noise, NaN, other\). "
        r"Look at the mask first; it shows them.",
        lines[1],
    )


def test_a_forecast_whose_whole_mask_is_late_is_caught(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Visible and asked fit each other; but the task says from where on nothing is seen."""
    plant(monkeypatch, lambda mask, tokens: Mask(np.roll(mask.visible, 6), np.roll(mask.asked, 6), mask.frames))
    assert failed(of_tasks(trained, "spikes forecasting")) >= {"mask", "future", *VALUES}


def test_a_clock_that_is_a_token_late_is_caught(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask is right for the times that it is given; but they are not the recording's."""
    read = WindowReader.read

    def late(reader: WindowReader, *where: Any) -> Window:
        window = read(reader, *where)
        tokens = window.tokens
        return replace(window, tokens=replace(tokens, start_s=tokens.start_s - 0.1, stop_s=tokens.stop_s - 0.1))

    monkeypatch.setattr(WindowReader, "read", late)
    assert failed(of_tasks(trained, "spikes forecasting")) >= {"mask", "future", *VALUES}


def test_a_hidden_unit_is_hidden_in_all_of_its_streams(trained: Trained) -> None:
    window = one_window(trained.reader, "full")
    units, row = np.unique(window.tokens.source[is_activity(window.tokens)]), window.sources.row.copy()
    row[units[3]] = row[units[0]]  # two sources of one unit
    twin = replace(window, sources=replace(window.sources, row=row))
    asked = window.tokens.source == units[0]
    mask = Mask(is_activity(window.tokens) & ~asked, asked, frames=False)
    case = replace(audit.task_case(trained, TASKS[3], [window]), windows=[twin], masks=[mask])
    hidden, _ = must_hide(trained.store, case, 0)
    other = [window.tokens.source == units[number] for number in (3, 2)]
    assert hidden[other[0]].all() and not hidden[other[1]].any()
    assert audit.mask_check(trained.store, case).difference == hidden[other[0]].size


def test_a_task_that_asks_for_what_is_not_its_own_is_caught(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, lambda mask, tokens: replace(mask, asked=mask.asked | (tokens.modality == BEHAVIOR)))
    (row,) = [row for row in of_tasks(trained, "spikes forecasting") if row.check == "mask"]
    assert row.failed and "tokens are asked for that are not the task's" in row.detail


# ---------------------------------------------------------------- leaks in samples and batches


def test_hidden_values_that_are_left_in_the_input_are_caught(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask of a task of evaluation is right, but the sample is made as if all were visible."""

    def leaky(window: Window, mask: Mask, shape: Budget, *more: Any) -> Any:
        everything = replace(mask, visible=np.ones_like(mask.visible))
        return make_sample(window, everything, replace(shape, num_inputs=200), *more)

    for user in ("dataset", "loader"):
        monkeypatch.setattr(f"train.{user}.make_sample", leaky)
    rows = of_tasks(trained)
    for task in {row.task for row in rows}:
        assert failed([row for row in rows if row.task == task]) >= VALUES
    assert not any(row.failed for row in rows if row.check == "mask")
    (line,) = [line for line in failures(rows) if "LEAK traces co_smoothing" in line]
    assert "predictions follow hidden values, by up to inf (noise, NaN, other). Look at make_sample" in line
    for family in FAMILIES:
        assert failed(of_training(trained, family)) >= {"mask", *VALUES}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_samples_mask_for_all_of_a_batch_is_caught(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, family: Family
) -> None:
    """Copied when the batch is made: with decoding, too, whose masks are no draws."""

    def copied(samples: list[dict[str, Any]]) -> Any:
        names = ("query_source", "query_time_s", "label_mask", "frame_mask")
        shown = [
            name for name in samples[0] if name.startswith("input_") and name not in ("input_values", "input_observed")
        ]
        first = {name: samples[0][name] for name in (*names, *shown)}
        return collate([{**sample, **first} for sample in samples])

    monkeypatch.setattr(audit_training, "collate", copied)
    assert "own" in failed(of_training(trained, family))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "decoding"])
def test_a_mask_that_is_drawn_once_for_a_batch_is_caught(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, family: Family
) -> None:
    """Drawn from the first sample's chance, and kept for its step: each sample alone looks right."""
    drawn: list[tuple[int, Mask]] = []

    def once(family: Family, tokens: TokenTable, context_s: float, chance: np.random.Generator) -> Mask:
        if len(drawn) % RUN.train.global_batch_size == 0:
            drawn.clear()
        kept = [mask for size, mask in drawn if size == len(tokens.source)]
        mask = kept[0] if kept else draw_mask(family, tokens, context_s, chance)
        drawn.append((len(tokens.source), mask))
        return mask

    monkeypatch.setattr("train.loader.draw_mask", once)
    batches = TrainingBatches(trained, family)
    windows, _, num_strange = batches.first()
    assert num_strange == 0 and own_mask_share(batches, windows) == 1
    monkeypatch.undo()
    assert own_mask_share(TrainingBatches(trained, family), windows) < 1


def test_a_family_is_audited_also_in_a_run_where_another_one_has_weights_of_its_own(trained: Trained) -> None:
    weights = Weights(families={"encoding": {"traces": 2.0}})
    run = replace(trained.run, data=replace(trained.run.data, weights=weights))
    windows, _, num_strange = TrainingBatches(replace(trained, run=run), "decoding").first()
    assert len(windows) and num_strange == 0


def test_masks_are_compared_only_where_honest_ones_differ(trained: Trained) -> None:
    window, still, blind = (one_window(trained.reader, session) for session in ("full", "still", "blind"))
    assert chance_of_same("co_smoothing", window, 1.0) == 1 / 6
    assert chance_of_same("forecasting", window, 1.0) == 1 / 5  # a cut at the end of one of five tokens
    assert (
        chance_of_same(
            "forecasting",
            replace(
                window,
                tokens=replace(window.tokens, start_s=window.tokens.start_s * 0, stop_s=window.tokens.start_s * 0),
            ),
            1.0,
        )
        == 1
    )
    assert chance_of_same("encoding", still, 1.0) == pytest.approx(0.58) and chance_of_same("encoding", blind, 1.0) == 1
    assert chance_of_same("decoding", window, 1.0) == 1
    assert own_mask_share(TrainingBatches(trained, "encoding"), [blind]) is None


# ---------------------------------------------------------------- leaks in the model


def with_model(trained: Trained, monkeypatch: pytest.MonkeyPatch, change: Callable[..., None]) -> None:
    """A model whose predictions are changed in place, given the batch."""
    forward = trained.model.forward

    def changed(**batch: Any) -> Any:
        output = forward(**batch)
        change(output.predictions, batch)
        return output

    monkeypatch.setattr(trained.model, "forward", changed)


def follow_labels(predictions: torch.Tensor, batch: dict[str, Any]) -> None:
    if "labels" in batch:
        predictions += 1e-3 * batch["labels"].mean()


def follow_the_batch(predictions: torch.Tensor, batch: dict[str, Any]) -> None:
    predictions += 1e-3 * torch.arange(len(predictions))[:, None, None]


def follow_the_company(predictions: torch.Tensor, batch: dict[str, Any]) -> None:
    predictions += 1e-3 * batch["input_values"].nan_to_num().abs().sum(dim=(1, 2)).mean()


def follow_the_order(predictions: torch.Tensor, batch: dict[str, Any]) -> None:
    predictions += 1e-3 * batch["query_source"][..., None]


def follow_the_padding(predictions: torch.Tensor, batch: dict[str, Any]) -> None:
    predictions += 1e-3 * batch["input_mask"].shape[1]


@pytest.mark.parametrize(
    ("change", "checks", "place"),
    [
        (follow_the_batch, {"batch"}, "what mixes the batch axis in the model"),
        (follow_the_company, {"batch", "padding"}, "what mixes the batch axis in the model"),
        (follow_the_order, {"order"}, "what counts positions in the model"),
        (follow_the_padding, {"padding"}, "input_mask and frame_mask in the model, pad in train/dataset.py"),
    ],
)
def test_a_model_that_follows_what_has_no_meaning_is_caught(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, change: Callable[..., None], checks: set[str], place: str
) -> None:
    with_model(trained, monkeypatch, change)
    rows = of_tasks(trained, "spikes forecasting")
    assert failed(rows) == checks
    line = failures(rows)[0]
    assert CHECKS[min(checks)][0] in line and line.endswith(f"Look at {place}.")


def test_a_model_that_follows_its_labels_is_caught(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    with_model(trained, monkeypatch, follow_labels)
    assert failed(of_training(trained, "forecasting")) == {"future", *VALUES}


def test_a_reader_that_keeps_absolute_time_in_single_precision_is_caught(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = WindowReader.read

    def coarse(reader: WindowReader, index: int, start_ns: int, *more: Any) -> Window:
        window = read(reader, index, start_ns, *more)
        tokens = window.tokens
        start_s, stop_s = (
            np.float32(t + start_ns / 1e9) - np.float32(start_ns / 1e9) for t in (tokens.start_s, tokens.stop_s)
        )
        return replace(window, tokens=replace(tokens, start_s=start_s, stop_s=stop_s))

    monkeypatch.setattr(WindowReader, "read", coarse)
    assert "clock" in failed(of_tasks(trained, "spikes encoding"))


# ---------------------------------------------------------------- parts


def test_a_difference_is_infinite_where_there_is_none_to_take() -> None:
    one, two = np.array([[1.0, 2.0]], np.float32), np.array([[1.0, np.nan]], np.float32)
    assert difference([one], [one]) == 0 and difference([one], [one + 1]) == 1
    assert difference([one], [two]) == difference([two], [one]) == difference([one], [one[:, :1]]) == np.inf


def test_what_was_shuffled_is_put_back_in_order(trained: Trained) -> None:
    window = one_window(trained.reader, "full")
    mask = draw_mask("co_smoothing", window.tokens, 1.0, np.random.default_rng(0))
    mixed, mixed_mask, order = shuffle(window, mask, np.random.default_rng(1))
    assert not np.array_equal(mixed.token_ns, window.token_ns)
    np.testing.assert_array_equal(
        unshuffle(mixed.labels[mixed_mask.asked], mixed_mask, order), window.labels[mask.asked]
    )
    rows = (one.sources.row[one.tokens.source] for one in (mixed, window))
    np.testing.assert_array_equal(next(rows), next(rows)[order])


# ---------------------------------------------------------------- the command


def command(run_dir: Path, *more: str) -> int:
    parser = argparse.ArgumentParser()
    audit.configure(parser)
    return audit.main(parser.parse_args([str(run_dir), "--sessions", "1", "--windows", "1", *more]))


def test_the_command_ends_well_where_nothing_leaks(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handmade_run(tmp_path / "run", store, RUN)
    assert command(tmp_path / "run") == 0
    content = json.loads((tmp_path / "run" / "audit.json").read_text())
    rows = [Row(**row) for row in content["rows"]]
    assert content["split"] == "valid" and content["failures"] == [] and len(rows) > 100
    assert capsys.readouterr().out == f"{audit.table(rows)}\nNothing that is hidden was seen.\n"


def test_the_command_fails_where_something_leaks(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handmade_run(tmp_path / "run", store, RUN)
    plant(monkeypatch, behaviour_visible)
    assert command(tmp_path / "run", "--split", "test") == 1
    content = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert content["split"] == "test" and len(content["failures"]) >= 8
    assert capsys.readouterr().out.endswith("\n".join(content["failures"]) + "\n")


def test_a_store_without_a_held_out_window_says_what_to_do(store: Path, tmp_path: Path) -> None:
    long = replace(RUN, data=replace(RUN.data, context_s=4.0))
    handmade_run(tmp_path / "run", store, long)
    message = r"has no valid window of 4.0 s on which a task could be asked. Give the other --split, or a store with"
    with pytest.raises(audit.AuditError, match=message):
        command(tmp_path / "run")
