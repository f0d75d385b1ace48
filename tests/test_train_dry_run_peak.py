"""The dry run's estimate of memory, held against the peak of real training in clean processes.

In: two presets on a store of 80 units. Out: bytes by formula, and as the kernel (or the GPU) counted them: within 10 %.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from measured_peak import ALLOCATOR
from store_builders import stream, target, write_plan
from train_builders import ROOT, SECOND_NS, prepare_run, tiny_run, tiny_session, tiny_store, train_ranks

from prep import catalog
from prep.plan import Units
from prep.store import Store
from train.config import RunConfig, load
from train.dry_run import job_of
from train.memory import most
from train.network import free_port
from train.plan import plan_of, samples_of
from train.sources import SourceTable
from train.traffic import Machine, laptop

pytestmark = pytest.mark.slow
NUM_UNITS, LENGTH_S = 80, 60
only_on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU's memory")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One session, with more units than a window takes, a heading and a film."""
    folder = tmp_path_factory.mktemp("peak")
    root, recording = folder / "store", folder / "recording.txt"
    recording.write_text("stands for an NWB file")
    tiny, begin_ns, num_tokens = tiny_session(recording, "full", 0), 12_000_000 * SECOND_NS, 10 * LENGTH_S
    film = {"channels": ("screen",), "stimulus": tiny.stimuli[0].digest}
    streams = (
        stream("spikes", "counts", "spikes", (num_tokens, NUM_UNITS, 5), first_unit=0),
        stream("heading", "trace", "behavior", (num_tokens, 2, 5), channels=("cos", "sin")),
        stream("movie", "frames", "stimulus", (num_tokens, 1, 1), **film),
    )
    units = Units(
        unit_key=[f"d1/full/{i}" for i in range(NUM_UNITS)],
        kind=["unit"] * NUM_UNITS,
        region=[""] * NUM_UNITS,
        quality=[""] * NUM_UNITS,
        xyz_um=np.full((NUM_UNITS, 3), np.nan, np.float32),
    )
    splits = ((begin_ns, begin_ns + LENGTH_S * SECOND_NS, "train"),)
    plan = replace(tiny, units=units, streams=streams, splits=splits)
    write_plan(plan, target(root, plan))
    catalog.write(root)
    return root


def measured(run: RunConfig, store: Path, folder: Path, ranks: int) -> int:
    """The most bytes that training took in a rank, above what its process had after a tiny run."""
    run_dir = prepare_run(folder / "run", store, run)
    warm_dir = prepare_run(folder / "warm", tiny_store(folder), warm(run))
    command = [sys.executable, str(ROOT / "tests" / "measured_peak.py"), str(run_dir), str(warm_dir), free_port()]
    assert train_ranks(run_dir, slots=ranks, command=command) == 0
    return max(json.loads(path.read_text())["peak"] for path in run_dir.glob("peak-*.json"))


def warm(run: RunConfig) -> RunConfig:
    """A tiny run that does all that a run does, once."""
    tiny = tiny_run(num_steps=2, precision=run.train.precision)
    return replace(tiny, checkpoint_every=1, validate_every=1, ds_config=run.ds_config, faults=run.faults)


def estimated(run: RunConfig, store: Path, ranks: int, slack: float) -> float:
    """The same, by the dry run."""
    opened, on_cuda = Store(store), torch.cuda.is_available()
    job = job_of(run, 1, ranks, len(SourceTable(opened)), on_cuda)
    plan = plan_of(job, Machine(), *samples_of(run, opened))
    return most(plan.parts, *(("device",) if on_cuda else ("device", "host"))) * (1 + slack)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "allocator", [pytest.param(ALLOCATOR, id="exact"), pytest.param({}, id="as it is", marks=only_on_a_cpu)]
)
@pytest.mark.parametrize(
    ("preset", "ranks", "overrides"),
    [
        ("debug", 1, ["train.num_steps=10"]),
        ("debug", 1, ["train.num_steps=10", "train.average_steps=10", "train.global_batch_size=16"]),
        ("20m", 1, ["train.num_steps=5", "train.global_batch_size=16", "train.micro_batch_size=8"]),
        ("20m", 2, ["train.num_steps=5", "train.global_batch_size=16", "train.micro_batch_size=4"]),
    ],
)
def test_the_estimate_is_within_a_tenth_of_the_measured_peak(
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    preset: str,
    ranks: int,
    overrides: list[str],
    allocator: dict[str, str],
) -> None:
    """On CPUs, with and without what the allocator keeps; on a GPU, of what torch has allocated there (one rank)."""
    if torch.cuda.is_available() and ranks > torch.cuda.device_count():
        pytest.skip("needs a GPU for each rank")
    for name, value in allocator.items():
        monkeypatch.setenv(name, value)
    of_all = ["checkpoint_every=2", "train.precision=fp32", "data.num_workers=0", "faults.watchdog_s=600"]
    run = load(ROOT / "train" / "configs" / f"{preset}.yaml", [*overrides, *of_all])
    run = replace(run, ds_config=str(ROOT / run.ds_config))
    slack = 0.0 if allocator or torch.cuda.is_available() else laptop(16).slack
    by_formula, found = estimated(run, store, ranks, slack), measured(run, store, tmp_path, ranks)
    print(f"{preset} on {ranks}: {by_formula / 2**20:.1f} MiB by formula, {found / 2**20:.1f} measured")
    assert by_formula == pytest.approx(found, rel=0.1)
