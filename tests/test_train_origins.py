"""Sessions and subjects: rows that are added to all latents, and may be absent.

In: stores of one and of several sessions. Out: predictions without these rows bit by bit, rows that move, exports and
adapted models that use those they know.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from store_builders import target, write_plan
from test_train_export import streams_of
from train_builders import (
    batch_of,
    handmade_run,
    moved_model,
    moved_trained,
    one_window,
    reader_of,
    tiny_run,
    tiny_session,
    tiny_store,
)

from prep import catalog
from prep.store import Store
from train import export
from train.adapt import fit_rows
from train.build import build_model, model_config
from train.config import FAMILIES, OptimConfig
from train.dataset import WindowReader, make_sample
from train.loader import TrainingSamples, batches
from train.masking import TASKS, draw_mask, task_mask
from train.model.processing_brainloom import SESSION, BrainloomProcessor
from train.sources import SourceTable
from train.support import infer_rows
from train.trained import Trained, load_trained, open_hub
from train.unit_table import UnitTable

RUN = tiny_run()


def store_of(folder: Path, *subjects: str, first: str = "full") -> Path:
    """A store of one session a subject: the first is named `first`, the others `s1`, `s2`, …"""
    (folder / "recording.txt").write_text("stands for an NWB file")
    for number, subject_id in enumerate(subjects):
        plan = tiny_session(folder / "recording.txt", "still", number)
        name = f"s{number}" if number else first
        keys = [key.replace("/still/", f"/{name}/") for key in plan.units.unit_key]
        units = replace(plan.units, unit_key=keys)
        plan = replace(plan, session_id=name, subject_id=subject_id, units=units)
        write_plan(plan, target(folder / "store", plan))
    catalog.write(folder / "store")
    return folder / "store"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def reader(root: Path) -> WindowReader:
    return reader_of(root, RUN)


@pytest.fixture(scope="module")
def trained(root: Path) -> Trained:
    return moved_trained(root, RUN)


@pytest.fixture(scope="module")
def hub(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("origins") / "hub"
    export.export(trained, folder, None)
    return folder


def a_batch(reader: WindowReader, family: Any = "inpainting") -> dict[str, Any]:
    """Two windows of two sessions."""
    windows = [one_window(reader, name) for name in ("full", "imaging")]
    masks = [draw_mask(family, window.tokens, 1.0, np.random.default_rng(0)) for window in windows]
    return batch_of(reader, RUN, family, list(zip(windows, masks, strict=True)))


def without_origins(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with their rows absent."""
    is_origin = batch["source_modality"] == SESSION
    return {**batch, "unit_embeds": torch.where(is_origin[..., None], 0.0, batch["unit_embeds"])}


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("subjects", "expected"),
    [
        (["m"], []),
        (["m", "m"], ["d1/session:full", "d1/session:s1"]),
        (["", ""], ["d1/session:full", "d1/session:s1"]),
        (
            ["m", "m", "n", ""],
            [*(f"d1/session:{name}" for name in ("full", "s1", "s2", "s3")), "d1/subject:m", "d1/subject:n"],
        ),
    ],
)
def test_only_what_tells_sessions_apart_has_a_row(tmp_path: Path, subjects: list[str], expected: list[str]) -> None:
    store = Store(store_of(tmp_path, *subjects))
    table = SourceTable(store)
    assert table.origin_keys == expected == table.keys[len(table) - len(expected) :]
    for entry in store.entries:
        rows = table.origins(entry)
        own = (f":{entry['session_id']}", f":{entry['subject_id']}")
        assert list(rows) == [key for key in expected if key.endswith(own)]
        assert [table.keys[row] for row in rows.values()] == list(rows)
    window = one_window(reader_of(tmp_path / "store", RUN), "full")
    assert (window.sources.modality == SESSION).sum() == sum(key.endswith((":full", ":m")) for key in expected)
    assert not (window.sources.modality == SESSION)[window.tokens.source].any(), "they have no token"


def test_a_draw_of_units_neither_counts_nor_drops_them(reader: WindowReader) -> None:
    whole = one_window(reader, "full")
    few = reader.read(whole.session, whole.start_ns, 10**9, max_units=2, chance=np.random.default_rng(0))
    assert (few.sources.modality < 2).sum() == 2 and (few.sources.modality == SESSION).sum() == 2


def test_most_samples_are_as_of_a_new_subject_and_some_as_of_a_new_session(root: Path) -> None:
    run = replace(RUN, train=replace(RUN.train, unit_dropout=0.0))
    samples = TrainingSamples(root, run, model_config(run))
    drawn = [samples[position] for position in range(80)]
    rows = np.stack([one["unit_rows"][one["source_modality"] == SESSION] for one in drawn])
    session, subject = (rows == -1).T
    assert rows.shape == (80, 2) and session[subject].all()
    assert 50 < subject.sum() < 70 and 0 < (session & ~subject).sum() < 20 and 0 < (~session).sum() < 20


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("family", FAMILIES)
def test_where_they_are_absent_the_model_is_the_one_without_them(reader: WindowReader, family: str) -> None:
    """Bit by bit: without rows, as if they were padding, and as if nothing read them."""
    model, batch = moved_model(RUN), a_batch(reader, family)
    is_origin = batch["source_modality"] == SESSION
    assert is_origin.sum(1).tolist() == [2, 2]
    with torch.inference_mode():
        known, absent = model(**batch), model(**without_origins(batch))
        padding = {**without_origins(batch), "source_modality": torch.where(is_origin, 0, batch["source_modality"])}
        assert torch.equal(model(**padding).predictions, absent.predictions)
        model.model.session_proj.weight.zero_()
        assert torch.equal(model(**batch).predictions, absent.predictions)
    assert not torch.equal(known.predictions, absent.predictions)


def test_a_fresh_model_does_not_hear_them(reader: WindowReader) -> None:
    model, batch = build_model(RUN).eval(), a_batch(reader)
    with torch.inference_mode():
        assert torch.equal(model(**batch).predictions, model(**without_origins(batch)).predictions)


def test_their_order_has_no_meaning_and_nobody_elses_row_is_added(reader: WindowReader) -> None:
    model, batch = moved_model(RUN), a_batch(reader)
    first, second = batch["source_modality"][0].eq(SESSION).nonzero().flatten().tolist()
    order = torch.arange(batch["source_modality"].shape[1])
    order[[first, second]] = order[[second, first]]
    mixed = {name: batch[name][:, order] for name in ("unit_embeds", "unit_features", "source_modality", "source_null")}
    with torch.inference_mode():
        before = model(**batch)
        assert torch.equal(model(**{**batch, **mixed}).predictions, before.predictions)
        batch["unit_embeds"][1, batch["source_modality"][1] == SESSION] = 1.0
        changed = model(**batch)
    assert torch.equal(changed.predictions[0], before.predictions[0])
    assert not torch.equal(changed.predictions[1], before.predictions[1])


def test_the_loss_reaches_their_rows_and_what_reads_them(reader: WindowReader) -> None:
    model, batch = moved_model(RUN), a_batch(reader)
    embeds = batch["unit_embeds"].requires_grad_()
    model(**batch).loss.backward()
    assert embeds.grad[batch["source_modality"] == SESSION].abs().sum(-1).gt(0).all()
    assert model.model.session_proj.weight.grad.abs().sum() > 0


def test_rows_of_two_sessions_move_in_training(tmp_path: Path) -> None:
    store = store_of(tmp_path, "m", "n")
    samples, model = TrainingSamples(store, RUN, model_config(RUN)), build_model(RUN)
    source_table = SourceTable(Store(store))
    table = UnitTable(source_table.keys, 16, torch.device("cpu"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    before = table.weight.clone()
    for batch in batches(samples, 0, 0, 1):
        optimizer.zero_grad()
        model(unit_embeds=table.lookup(batch.pop("unit_rows")), **batch).loss.backward()
        optimizer.step()
        table.step(0.1)
    moved = (table.weight != before).any(1)
    assert len(source_table.origin_keys) == 4 and moved[-4:].all()
    assert model.model.session_proj.weight.abs().sum() > 0


# ---------------------------------------------------------------- hub folders


def test_the_hub_has_each_of_them_once_and_predicts_the_same_with_them(
    trained: Trained, hub: Path, tmp_path: Path
) -> None:
    processor = BrainloomProcessor.from_pretrained(hub)
    window = one_window(trained.reader, "full", 20.0)
    mask = task_mask(TASKS[0], window.tokens, 1.0)
    raw = export.raw_window(trained, window, mask)
    assert raw["session"].tolist() == ["d1/session:full", "d1/subject:mouse-0"]
    shown = {"pixels": raw["pixels"], "frame_time_s": raw["frame_time_s"]}
    keys = ["d1/subject:mouse-0", "d1/session:nobody", "d1/session:full", "d1/full/0"]  # another order, and no origins
    with torch.inference_mode():
        known, unknown, absent = (
            trained.model(**processor(streams_of(raw), **shown, session=which)).predictions[0]
            for which in (keys, ["d1/session:nobody"], [])
        )
    (expected,) = trained.predict([window], [mask])
    assert (known - torch.from_numpy(expected)).abs().max() < 1e-5
    assert torch.equal(unknown, absent) and (known - absent).abs().max() > 1e-4
    shared = moved_trained(store_of(tmp_path, "m", "m", "n"), RUN)
    keys = export.processor(shared).unit_keys
    assert len(keys) == len(set(keys)) and keys.count("d1/subject:m") == 1


def test_a_run_is_loaded_with_the_rows_that_it_has_trained_alone(tmp_path: Path) -> None:
    """One whose store has grown since does not hear rows that were never trained."""
    store = store_of(tmp_path, "m")
    handmade_run(tmp_path / "run", store, RUN)
    store_of(tmp_path, "m", "n")
    loaded = load_trained(tmp_path / "run")
    assert len(loaded.store.entries) == 2 and loaded.reader.source_table.origin_keys == []


def test_adapting_takes_known_origins_and_leaves_the_others_out(hub: Path, trained: Trained, tmp_path: Path) -> None:
    store = Store(store_of(tmp_path, "mouse-0", "new", first="again"))
    adapted, known = open_hub(hub, store)
    (key,) = adapted.reader.source_table.origin_keys
    assert key == "d1/subject:mouse-0", "a known subject in a session that is new"
    row, own = adapted.table.keys.index(key), trained.table.keys.index(key)
    assert torch.equal(adapted.table.weight[row], trained.table.weight[own]) and not known.unknown[row]
    assert not any("session:" in line or "subject:" in line for line in known.matched)
    before = adapted.table.weight[row].clone()
    fit_rows(adapted, known.unknown, OptimConfig(num_steps=2, global_batch_size=4, micro_batch_size=2, warmup_steps=1))
    assert torch.equal(adapted.table.weight[row], before)
    numbers = [one_window(adapted.reader, name).sources.modality.tolist().count(SESSION) for name in ("again", "s1")]
    assert numbers == [1, 0]
    (alone := tmp_path / "alone").mkdir()
    again, _ = open_hub(hub, Store(store_of(alone, "mouse-0")))
    assert again.reader.source_table.origin_keys == ["d1/session:full", "d1/subject:mouse-0"], "known, so single or not"


def test_priors_of_new_units_are_of_units(hub: Path, tmp_path: Path) -> None:
    adapted, known = open_hub(hub, Store(store_of(tmp_path, "new", first="new")))
    assert (known.modality == SESSION).sum() == 8
    changed = replace(known, rows=torch.where((known.modality == SESSION)[:, None], torch.nan, known.rows))
    assert infer_rows(adapted, 0, changed, lambda _: None) > 0
    assert adapted.table.weight.isfinite().all()


def test_samples_of_a_hub_have_the_rows_of_its_table(hub: Path, tmp_path: Path) -> None:
    store = store_of(tmp_path, "mouse-0", "new")
    adapted, _ = open_hub(hub, Store(store))
    own = adapted.reader.source_table.origin_keys
    samples = TrainingSamples(store, RUN, adapted.model.config, own)
    rows = np.concatenate([samples[position]["unit_rows"] for position in range(8)])
    assert rows.max() < len(adapted.table.keys) and samples.budgets[RUN.turn(0)].num_sources == 6 + len(own)
    nothing = samples._reader.nothing(0, 0)
    mask = draw_mask("encoding", nothing.tokens, 1.0, np.random.default_rng(0))
    assert (make_sample(nothing, mask, samples.budgets[RUN.turn(0)])["unit_rows"] == -1).all()
