"""The order of windows: a pure function of seed, pass and position, whatever reads it.

In: positions. Out: windows; the same for one and two ranks, for threads and worker processes, and after a resume.
"""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from train_builders import tiny_run, tiny_store

from train.build import model_config
from train.config import RunConfig
from train.loader import TrainingSamples, batches
from train.sampler import Draw, draw, mix, permute, positions

RUN = tiny_run(num_steps=6)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.getbasetemp())


def collected(store: Path, run: RunConfig, rank: int, world_size: int, first_step: int = 0) -> list[dict[str, Tensor]]:
    """All batches of one rank, as its loop gets them."""
    return list(batches(TrainingSamples(store, run, model_config(run)), first_step, rank, world_size))


def assert_same(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        different = [
            name for name in a if not torch.equal(torch.nan_to_num(a[name], 99), torch.nan_to_num(b[name], 99))
        ]
        assert not different


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1000, 4097])
@pytest.mark.parametrize("key", [0, 1, 2**63])
def test_permute_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


def test_permute_is_the_same_function_everywhere() -> None:
    assert [permute(index, 10, 7) for index in range(10)] == [permute(index, 10, 7) for index in range(10)]
    assert [permute(index, 1000, 7) for index in range(5)] != [permute(index, 1000, 8) for index in range(5)]
    assert mix(0, 0) == 0xE220A8397B1DCDAF  # the first number of splitmix64 from seed 0 (Vigna's reference)


def test_each_pass_holds_every_window_once_in_an_order_of_its_own() -> None:
    passes = [[draw(100 * number + i, 100, 3, 8) for i in range(100)] for number in range(3)]
    orders = [[drawn.window for drawn in one] for one in passes]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert [{drawn.pass_ for drawn in one} for one in passes] == [{0}, {1}, {2}]


def test_a_draw_knows_its_step_and_its_own_chance() -> None:
    assert draw(17, 100, 3, 8) == Draw(17, 0, draw(17, 100, 3, 8).window, 2)
    first, again, next_ = (draw(position, 100, 3, 8).generator(3).random(4).tolist() for position in (5, 5, 6))
    assert first == again != next_


@pytest.mark.parametrize("micro_batch_size", [2, 4])
def test_ranks_together_read_the_same_positions_in_the_same_order(micro_batch_size: int) -> None:
    expected = [list(range(8 * step, 8 * step + 8)) for step in range(3, 6)]
    for world_size in (1, 2, 4) if micro_batch_size == 2 else (1, 2):
        ranks = [list(positions(3, 6, 8, micro_batch_size, rank, world_size)) for rank in range(world_size)]
        per_step = 8 // world_size // micro_batch_size
        assert all(len(rank) == 3 * per_step for rank in ranks)
        for step in range(3):
            mine = [rank[step * per_step : (step + 1) * per_step] for rank in ranks]
            assert [position for rank in mine for micro in rank for position in micro] == expected[step]


def test_batches_of_two_ranks_are_those_of_one(store: Path) -> None:
    one = collected(store, RUN, 0, 1)
    first, second = (collected(store, RUN, rank, 2) for rank in range(2))
    assert len(one) == 2 * len(first) == 12
    assert_same(one, [batch for pair in zip(first, second, strict=True) for batch in pair])


def test_batches_of_two_loader_processes_are_those_of_none(store: Path) -> None:
    run = replace(RUN, data=replace(RUN.data, num_workers=2))
    assert_same(collected(store, RUN, 1, 2), collected(store, run, 1, 2))


def test_batches_go_on_from_any_step(store: Path) -> None:
    assert_same(collected(store, RUN, 0, 2)[4:], collected(store, RUN, 0, 2, first_step=4))


def test_all_samples_of_a_step_are_of_one_family(store: Path) -> None:
    run = replace(RUN, train=replace(RUN.train, families=("encoding", "decoding")))
    for step, batch in enumerate(batches(TrainingSamples(store, run, model_config(run)), 0, 0, 2)):
        modality = batch["source_modality"].gather(1, batch["query_source"])[batch["label_mask"].any(-1)]
        assert set(modality.tolist()) <= ({0, 1} if step % 2 == 0 else {2})


def test_each_turn_has_windows_of_its_own_length(store: Path) -> None:
    run = replace(RUN, train=replace(RUN.train, families=("forecasting+decoding@1.5", "co_smoothing+decoding@0.5")))
    samples = TrainingSamples(store, run, model_config(run))
    shapes: dict[float, set[tuple[int, ...]]] = {}
    for step, batch in enumerate(batches(samples, 0, 0, 2)):
        context_s = run.turn(step).context_s
        times_s = batch["query_time_s"][batch["label_mask"].any(-1)]
        assert times_s.min() >= 0 and times_s.max() < context_s
        shapes.setdefault(context_s, set()).add(tuple(batch["input_values"].shape))
    assert all(len(found) == 1 for found in shapes.values()) and len(shapes) == 2
    assert samples.windows.context_ns == 1_500_000_000  # one order of windows, those of the longest turn


def test_an_error_of_the_reader_reaches_the_loop(store: Path) -> None:
    samples = TrainingSamples(store, RUN, model_config(RUN))
    samples.budgets.clear()
    with pytest.raises(KeyError):
        next(batches(samples, 0, 0, 1))


def test_a_loop_that_stops_early_leaves_no_thread(store: Path) -> None:
    before = threading.active_count()
    feed = batches(TrainingSamples(store, RUN, model_config(RUN)), 0, 0, 1)
    next(feed)
    feed.close()
    assert threading.active_count() == before
