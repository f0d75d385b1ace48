"""The unit table beside ZeRO: one norm of the gradient and one factor for core and table, and one decision to skip.

In: one rank that takes three steps. Out: what the core's optimizer and the table were given, as the rank wrote it down.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from train_builders import prepare_run, tiny_run, tiny_store, train_ranks

# Two steps as they are, and a third on which the table's gradient is not finite.
THREE_STEPS = """
import json, sys
from pathlib import Path
import deepspeed, torch
from prep.store import Store
from train import config
from train.build import model_config
from train.engine import Engine
from train.loader import TrainingSamples, batches
from train.sources import SourceTable
deepspeed.init_distributed("gloo", verbose=False)
out = Path(sys.argv[1])
run, store = config.load(out / "config.yaml"), Store(json.loads((out / "run.json").read_text())["store"])
engine = Engine(run, SourceTable(store).keys, 1)
feed = batches(TrainingSamples(store.address, run, model_config(run)), 0, 0, 1)
core, table = [], []
inner, move = engine.optimizer.optimizer, engine.table.step
stage3 = engine.ds_config["zero_optimization"]["stage"] == 3
masters = engine.optimizer.fp32_partitioned_groups_flat if stage3 else engine.optimizer.single_partition_of_fp32_groups
def see_core(optimizer, *_):
    core.append(sum(float(p.grad.square().sum()) for group in optimizer.param_groups for p in group["params"]))
def see_table(lr, number, keep, scale):
    table.append(float(engine.table.norm * scale) ** 2)
    move(lr, number, keep, scale)
inner.register_step_pre_hook(see_core)
engine.table.step = see_table
rows = []
for step in range(3):
    if step == 2:
        exchange = engine.table.exchange
        engine.table.exchange = lambda: (exchange(), engine.table.norm.fill_(float("nan")))
    before = [tensor.detach().clone() for tensor in (*masters, engine.table.weight)]
    engine.train_step([next(feed) for _ in range(2)], step)
    moved = [not torch.equal(*pair) for pair in zip(before, [*masters, engine.table.weight], strict=True)]
    rows.append({"core": sum(core), "table": sum(table), "moved": moved})
    core.clear(), table.clear()
feed.close()
(out / "rows.json").write_text(json.dumps(rows))
"""


@pytest.fixture(scope="module", params=[3, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (2, 1))])
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each step's optimizers got, squared and summed, under a stage of ZeRO."""
    folder = tmp_path_factory.mktemp(f"zero{request.param}")
    tiny = tiny_run(clip_norm=0.25)
    mechanics = {**json.loads(Path(tiny.ds_config).read_text()), "zero_optimization": {"stage": request.param}}
    (folder / "ds.json").write_text(json.dumps(mechanics))
    tiny = replace(tiny, ds_config=str(folder / "ds.json"))
    out = prepare_run(folder / "run", tiny_store(tmp_path_factory.getbasetemp()), tiny)
    assert train_ranks(out, slots=1, command=[sys.executable, "-c", THREE_STEPS, str(out)]) == 0
    found: list[dict[str, Any]] = json.loads((out / "rows.json").read_text())
    return found


def test_core_and_table_are_clipped_by_one_factor_to_one_norm(rows: list[dict[str, Any]]) -> None:
    for row in rows[:2]:
        assert (row["core"] + row["table"]) ** 0.5 == pytest.approx(0.25, rel=1e-5)
        assert row["table"] > 1e-4 * row["core"], "a table that is next to nothing would prove nothing"
        assert all(row["moved"])


def test_a_gradient_of_the_table_that_is_not_finite_moves_neither(rows: list[dict[str, Any]]) -> None:
    assert rows[2]["core"] == rows[2]["table"] == 0 and not any(rows[2]["moved"])
