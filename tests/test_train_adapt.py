"""Adapting a hub folder to another store: rows by key, channels by name, new units inferred from a support segment.

In: a moved model on a tiny store, a store with other sessions. Out: rows, reports, messages; weights that stay.
"""

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from store_builders import target, write_plan
from train_builders import moved_trained, tiny_run, tiny_session, tiny_store

from prep import catalog
from prep.settings import ConfigError
from prep.store import Store
from train import adapt, evaluate, export
from train.dataset import Window
from train.masking import TASKS, Mask
from train.support import Prior, infer_rows, most_probable, others_mask, read_segments, segment_nats, support_mask
from train.trained import Trained, load_trained, open_hub

RUN = tiny_run()
Masked = Callable[[Window, np.ndarray], Mask]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return moved_trained(tiny_store(tmp_path_factory.getbasetemp()), RUN)


@pytest.fixture(scope="module")
def hub(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapt") / "hub"
    export.export(trained, folder, None)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of another dataset: its sessions are new, its channels have the names of the first."""
    parent = tmp_path_factory.mktemp("other")
    (parent / "recording.txt").write_text("stands for an NWB file")
    root = parent / "store"
    for number, session_id in enumerate(("full", "imaging", "still")):
        plan = tiny_session(parent / "recording.txt", session_id, number + 7)
        keys = [key.replace("d1/", "d2/") for key in plan.units.unit_key]
        plan = replace(plan, dataset_id="d2", units=replace(plan.units, unit_key=keys))
        write_plan(plan, target(root, plan))
    catalog.write(root)
    return root


def arguments(hub: Path, store: Path, out: Path, **more: Any) -> Namespace:
    return Namespace(**{"hub": hub, "store": str(store), "out": out, "steps": 0, "lr": 0.03, "dry_run": False, **more})


def test_a_store_that_is_known_keeps_every_row(trained: Trained, hub: Path, tmp_path: Path) -> None:
    again, known = open_hub(hub, trained.store)
    assert not known.unknown.any() and known.matched == []
    assert torch.equal(again.table.weight, trained.table.weight) and again.table.keys == trained.table.keys
    assert adapt.main(arguments(hub, Path(trained.store.address), tmp_path / "same")) == 0
    assert json.loads((tmp_path / "same" / "adapt.json").read_text())["inferred"] == 0


def test_channels_of_another_dataset_are_known_by_their_name_and_units_are_not(hub: Path, other: Path) -> None:
    adapted, known = open_hub(hub, Store(str(other)))
    names = [key for key, new in zip(adapted.table.keys, known.unknown, strict=True) if not new]
    assert names == ["d2/cos", "d2/pupil", "d2/sin", "d2/v"] or sorted(names) == sorted(
        adapted.reader.source_table.channel_keys
    )
    assert any("is taken for d1/" in line for line in known.matched)


def test_new_units_are_inferred_and_nothing_else_changes(
    hub: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new"
    assert adapt.main(arguments(hub, other, out)) == 0
    said = capsys.readouterr().out
    assert "d2/full: 6 spikes units" in said and "d2/imaging: 3 traces units" in said
    before, after = (load_file(folder / "model.safetensors") for folder in (hub, out / "hub"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    report = json.loads((out / "adapt.json").read_text())
    assert report["inferred"] == 15 and report["support_windows"][0] > 0
    adapted = load_trained(out)
    assert adapted.table.weight.isfinite().all() and not adapted.table.weight[:6].eq(0).any()
    rows = evaluate.evaluate(adapted, "test", evaluate.References(None), 2)
    assert {row.task for row in rows} <= set(TASKS) and rows


@pytest.mark.parametrize("masked", [support_mask, others_mask])
def test_the_inferred_rows_explain_more_of_the_support_than_no_rows(hub: Path, other: Path, masked: Masked) -> None:
    adapted, known = open_hub(hub, Store(str(other)))
    starts = [int(adapted.store.entries[0]["splits"][0][0]) + i * 1_000_000_000 for i in range(10)]
    units = np.flatnonzero(adapted.reader.sources(0).modality == 0)
    segments = list(read_segments(adapted, 0, starts, units, masked))
    prior = Prior.of(known.rows[known.modality == 0])
    rows = most_probable(adapted, segments, prior.mean_E.expand(len(units), -1), prior, 60)

    def cost(rows: torch.Tensor) -> float:
        found = sum(segment_nats(adapted, segment, rows) for segment in segments)
        return float(found + prior.nats(rows))

    assert cost(rows) < cost(prior.mean_E.expand(len(units), -1)) and cost(rows) < cost(torch.zeros_like(rows))


def test_new_units_are_read_from_others_and_never_from_themselves(hub: Path, other: Path) -> None:
    """What a segment holds of a unit, so that its row can be a regression, does not depend on what the unit did."""
    adapted, _ = open_hub(hub, Store(str(other)))
    start = int(adapted.store.entries[0]["splits"][0][0])
    units = np.flatnonzero(adapted.reader.sources(0).modality == 0)
    (before,) = read_segments(adapted, 0, [start], units, others_mask)
    read, moved = adapted.reader.read, units[before.asked["source_fold"][0].numpy() == 0]

    def changed(*where: Any) -> Window:
        window = read(*where)
        own = np.isin(window.tokens.source, moved)
        return replace(window, values=np.where(own[:, None], 1 - 2 * window.values, window.values))

    adapted.reader.read = changed  # type: ignore[method-assign]  # of this reader alone
    (after,) = read_segments(adapted, 0, [start], units, others_mask)
    assert torch.equal(before.asked["left_out"][:, 0], after.asked["left_out"][:, 0])
    assert not torch.equal(before.asked["left_out"][:, 1], after.asked["left_out"][:, 1])


def test_fitting_moves_new_rows_alone(trained: Trained, hub: Path, other: Path, tmp_path: Path) -> None:
    out = tmp_path / "fit"
    assert adapt.main(arguments(hub, other, out, steps=2)) == 0
    inferred, _ = open_hub(hub, Store(str(other)))
    fitted = load_trained(out)
    channels = [fitted.table.keys.index(key) for key in fitted.reader.source_table.channel_keys]
    assert torch.equal(fitted.table.weight[channels], inferred.table.weight[channels])
    before, after = (load_file(folder / "model.safetensors") for folder in (hub, out / "hub"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_session_without_stimulus_and_behaviour_is_said_to_have_nothing_to_infer_from(
    hub: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted, known = open_hub(hub, Store(str(other)))
    entry = adapted.store.entries[0]
    entry["streams"] = [s for s in entry["streams"] if s["modality"] == "spikes"]
    assert adapt.infer_all(adapted, 0, known) == 0
    assert "no stimulus, no behaviour" in capsys.readouterr().out


def held_out(parent: Path, begin_s: float = 12_000_000, label: str = "train") -> Path:
    """A store of one new session, which begins anywhere, in one split."""
    (parent / "recording.txt").write_text("stands for an NWB file")
    plan = tiny_session(parent / "recording.txt", "full", 7, begin_s)
    keys = [key.replace("d1/", "d2/") for key in plan.units.unit_key]
    begin_ns, units = plan.splits[0][0], replace(plan.units, unit_key=keys)
    plan = replace(plan, dataset_id="d2", units=units, splits=((begin_ns, begin_ns + 24_000_000_000, label),))
    write_plan(plan, target(parent / "store", plan))
    catalog.write(parent / "store")
    return parent / "store"


def test_a_recording_that_begins_before_zero_is_inferred_like_any_other(hub: Path, tmp_path: Path) -> None:
    """Clocks may count from an event: prep keeps times below zero."""
    adapted, known = open_hub(hub, Store(str(held_out(tmp_path, begin_s=-5.0))))
    assert adapt.infer_all(adapted, 0, known) > 0
    rows = adapted.table.weight[torch.from_numpy(adapted.reader.sources(0).row)]
    assert rows[torch.from_numpy(adapted.reader.sources(0).modality == 0)].any(1).all()


def test_what_was_not_inferred_is_not_said_to_be(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = held_out(tmp_path, label="test")
    assert adapt.main(arguments(hub, store, tmp_path / "adapted")) == 0
    report = json.loads((tmp_path / "adapted" / "adapt.json").read_text())
    assert (report["inferred"], report["support_windows"]) == (0, [0])
    assert "d2/full: no window in its train split: 6 new units have measured features only" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(hub: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert adapt.main(arguments(hub, other, tmp_path / "dry", dry_run=True)) == 0
    assert "19 sources: 4 known, 15 new" in capsys.readouterr().out and not (tmp_path / "dry").exists()


def test_what_is_no_hub_folder_is_refused(other: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no hub folder: it has no config.json. Make one: make export"):
        adapt.main(arguments(tmp_path, other, tmp_path / "out"))


def test_a_hub_folder_of_another_version_is_refused(hub: Path, other: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(hub, old)
    config = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(json.dumps({**config, "population_channels": config["population_channels"] + 1}))
    with pytest.raises(ConfigError, match=r"old holds weights of other names or shapes .* Use that version, or train"):
        open_hub(old, Store(other))


def test_a_folder_of_something_else_is_left_alone(hub: Path, other: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"is neither empty nor an adapted model\. Give another --out"):
        adapt.main(arguments(hub, other, tmp_path))
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_the_prior_is_the_normal_distribution_of_the_rows() -> None:
    rows = (
        torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.tensor([1.0, 2.0, 0.5])) + 4
    )
    prior = Prior.of(rows)
    covariance = torch.cov(rows.T)
    mixed = 0.9 * covariance + 0.1 * covariance.diagonal().mean() * torch.eye(3)
    normal = torch.distributions.MultivariateNormal(rows.mean(0), mixed)
    asked = torch.tensor([[4.0, 4.0, 4.0], [1.0, 0.0, 5.0]])
    expected = -(normal.log_prob(asked) - normal.log_prob(rows.mean(0))).sum()
    assert float(prior.nats(asked)) == pytest.approx(float(expected), rel=1e-3)
    assert Prior.of(rows[:1]).precision_EE.equal(torch.eye(3)), "one row has no spread"


def test_nothing_is_inferred_where_all_is_known(trained: Trained, hub: Path) -> None:
    adapted, known = open_hub(hub, trained.store)
    assert infer_rows(adapted, 0, known, print) == 0
