"""What DeepSpeed really sends in a step, call by call, beside what the plan says.

In: a tiny run on two ranks that count their collectives. Out: as many of them, of as many bytes.
"""

import json
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from train_builders import ROOT, prepare_run, tiny_run, tiny_store, train_ranks

from prep.store import Store
from train.config import RunConfig
from train.dry_run import job_of
from train.plan import plan_of, samples_of
from train.sources import SourceTable
from train.traffic import Exchange, laptop

pytestmark = pytest.mark.slow

CALLS = {"gathered": "all_gather_into_tensor", "scattered": "reduce_scatter_tensor", "reduced": "all_reduce"}
CALLS |= {"sums": "all_reduce", "table": "all_to_all_single", "pieces": "reduce", "directions": "broadcast"}


def call_of(exchange: Exchange) -> str:
    return next(call for word, call in CALLS.items() if word in exchange.name)


def with_mechanics(run: RunConfig, folder: Path, name: str, **zero: Any) -> RunConfig:
    mechanics = json.loads((ROOT / "ds_configs" / name).read_text())
    mechanics["zero_optimization"] |= zero
    (folder / name).write_text(json.dumps(mechanics))
    return replace(run, ds_config=str(folder / name))


SMALL = {"stage3_param_persistence_threshold": 200, "reduce_bucket_size": 40_000}


@pytest.mark.parametrize(
    ("name", "zero", "train"),
    [
        ("zero3.json", {}, {"micro_batch_size": 2}),
        ("zero3.json", SMALL, {"micro_batch_size": 1}),
        ("zero1.json", {}, {"micro_batch_size": 1}),
        ("zero3.json", {}, {"optimizer": "muon"}),
        ("zero1.json", {}, {"optimizer": "muon"}),
    ],
    ids=["whole", "partitioned, in buckets, two micro-batches", "zero1", "muon", "zero1, muon"],
)
def test_a_step_sends_what_the_plan_says(
    tmp_path: Path, name: str, zero: dict[str, Any], train: dict[str, Any]
) -> None:
    store, run = tiny_store(tmp_path), tiny_run(num_steps=3, **train)
    run = with_mechanics(run, tmp_path, name, **zero)
    run_dir = prepare_run(tmp_path / "run", store, run)
    command = [sys.executable, str(ROOT / "tests" / "counted_collectives.py"), str(run_dir)]
    assert train_ranks(run_dir, command=command) == 0
    last = (run_dir / "collectives.jsonl").read_text().splitlines()[-1]
    counted: dict[str, list[float]] = defaultdict(lambda: [0, 0])
    for call, size in json.loads(last):
        counted[call] = [counted[call][0] + 1, counted[call][1] + size]
    job = job_of(run, 2, 1, len(SourceTable(Store(store))), on_cuda=False)
    said: dict[str, list[float]] = defaultdict(lambda: [0, 0])
    for exchange in plan_of(job, laptop(8), *samples_of(run, Store(store))).exchanges:
        call = call_of(exchange)
        twice = 2 if call in ("all_reduce", "reduce_scatter_tensor") else 1  # one call goes around twice
        rounds, size = said[call]
        said[call] = [rounds + exchange.rounds / twice, size + exchange.payload * exchange.times / twice]
    assert {call: number for call, (number, _) in counted.items()} == {
        call: number for call, (number, _) in said.items()
    }
    table = "all_to_all_single"  # of the rows that windows have in common, which the plan does not know
    assert counted.pop(table)[1] <= said.pop(table)[1]
    for call, (_, size) in counted.items():
        assert size == pytest.approx(said[call][1], rel=0.02), call
