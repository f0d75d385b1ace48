"""Damaged shards in training: named, and by policy the run stops or goes on without their windows, in the same shapes.

In: a store of which one byte was changed, or one file is gone. Out: batches, what is said of them.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from train_builders import arguments, moved_model, prepare_run, reader_of, tiny_run, tiny_store, train_ranks

from prep.store import DigestError
from train.build import model_config
from train.config import FAMILIES, Family, RunConfig
from train.dataset import make_sample
from train.loader import Skipped, TrainingSamples, batches
from train.masking import draw_mask
from train.metrics import read_metrics

RUN = tiny_run(num_steps=10)
SKIP = replace(RUN, data=replace(RUN.data, bad_windows="skip"))
SHARD = "d1/full.zarr/streams/spikes/values/c/0/0/0"


def flip(path: Path) -> None:
    """Change one bit of the second chunk."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 - 40] ^= 4
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {"flipped": flip, "missing": Path.unlink}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.getbasetemp())


@pytest.fixture(params=["flipped", pytest.param("missing", marks=pytest.mark.slow)])
def damaged(request: pytest.FixtureRequest, whole: Path, tmp_path: Path) -> Path:
    root = Path(shutil.copytree(whole, tmp_path / "store"))
    DAMAGES[request.param](root / SHARD)
    return root


def read(
    store: Path, run: RunConfig, rank: int = 0, world_size: int = 1
) -> tuple[list[dict[str, Tensor]], list[Skipped]]:
    """All batches of a rank, and what was skipped."""
    feed = batches(TrainingSamples(store, run, model_config(run)), 0, rank, world_size)
    return list(feed), feed.skipped


def test_a_damaged_shard_stops_the_run_and_is_named(damaged: Path) -> None:
    with pytest.raises(DigestError, match=re.escape(str(damaged / SHARD))):
        read(damaged, RUN)


def test_a_damaged_shard_is_named_by_a_loader_process_too(whole: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(whole, tmp_path / "store"))
    flip(root / SHARD)
    with pytest.raises(DigestError, match=re.escape(f"{root / SHARD}: chunk") + r" \d+ is damaged"):
        read(root, replace(RUN, data=replace(RUN.data, num_workers=1)))


def test_skipped_windows_are_empty_samples_and_nothing_else_changes(whole: Path, damaged: Path) -> None:
    expected, nothing = read(whole, SKIP)
    found, skipped = read(damaged, SKIP)
    assert not nothing and 0 < len(skipped) < 20
    assert {one.session for one in skipped} == {"d1/full"}
    assert all(str(damaged / SHARD) in str(one) and f"position {one.position}" in str(one) for one in skipped)
    gone = {one.position for one in skipped}
    for number, (own, other) in enumerate(zip(found, expected, strict=True)):
        assert {name: column.shape for name, column in own.items()} == {
            name: column.shape for name, column in other.items()
        }
        for place in range(2):
            if 2 * number + place in gone:
                assert not any(own[name][place].any() for name in ("input_mask", "label_mask", "frame_mask"))
                assert (own["unit_rows"][place] == -1).all()
            else:
                assert all(same(own[name][place], other[name][place]) for name in own)


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(99), other.nan_to_num(99))


def test_what_is_skipped_is_the_same_for_ranks_and_loader_processes(damaged: Path) -> None:
    _, alone = read(damaged, SKIP)
    run = replace(SKIP, data=replace(SKIP.data, num_workers=1))
    ranks = [read(damaged, SKIP, 0, 2)[1], read(damaged, run, 1, 2)[1]]
    assert sorted(ranks[0] + ranks[1], key=lambda one: one.position) == alone


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_sample_weighs_nothing(whole: Path, family: Family) -> None:
    run = replace(SKIP, train=replace(SKIP.train, families=(family,)))
    samples, model = TrainingSamples(whole, run, model_config(run)), moved_model(run)
    reader = reader_of(whole, run)
    nothing = reader.nothing(0, 0)
    mask = draw_mask(family, nothing.tokens, 1.0, np.random.default_rng(0))
    empty = make_sample(nothing, mask, samples.budgets[run.turn(0)])
    with torch.inference_mode():
        both = model(**arguments(reader, run, [samples[0], empty]))
        alone = model(**arguments(reader, run, [empty, empty]))
    assert not both.nats[1].any() and not both.num_values[1].any() and both.num_values[0].any()
    assert float(alone.loss) == 0 and both.loss.isfinite()


def test_skipped_windows_are_counted_in_metrics_and_listed_with_their_files(whole: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(whole, tmp_path / "store"))
    flip(damaged / SHARD)
    run_dir = prepare_run(tmp_path / "run", damaged, SKIP)
    assert train_ranks(run_dir, slots=1) == 0
    _, skipped = read(damaged, SKIP)
    rows = [json.loads(line) for line in (run_dir / "incidents.jsonl").read_text().splitlines()]
    assert [row["position"] for row in rows] == [one.position for one in skipped] and skipped
    assert all(row["session"] == "d1/full" and str(damaged / SHARD) in row["why"] for row in rows)
    counted = [row["skipped_windows"] for row in read_metrics(run_dir)]
    assert counted == [sum(one.position // 4 == step for one in skipped) for step in range(10)]
