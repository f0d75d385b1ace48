"""The order of windows: a pure function of seed, pass and position, whatever reads it.

In: positions. Out: windows; the same for one and several ranks, for threads and worker processes, for micro-batches of
any size, and after a resume.
"""

import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from train_builders import tiny_run, tiny_store

from prep.settings import TOKEN_NS
from train.build import model_config
from train.config import ContextFrom, RunConfig
from train.dataset import Windows
from train.eras import Order, go_on
from train.loader import TrainingSamples, batches
from train.sampler import Draw, mix, permute, positions

RUN = tiny_run(num_steps=6)


def one_era(seed: int, **sessions: tuple[int, float]) -> Order:
    """The order of sessions of so many windows, each with its weight."""
    spans, first = {}, 0
    for key, (num_windows, weight) in sessions.items():
        spans[key] = (range(first, first + num_windows), weight)
        first += num_windows
    return Order([], spans, seed)


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
    order = one_era(3, a=(60, 1.0), b=(40, 1.0))
    passes = [[order.draw(100 * number + i) for i in range(100)] for number in range(3)]
    orders = [[drawn.window for drawn in one] for one in passes]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert [{drawn.pass_ for drawn in one} for one in passes] == [{0}, {1}, {2}]


def test_without_weights_the_order_is_the_permutation_of_all_windows() -> None:
    order = one_era(3, a=(7, 1.0), b=(93, 1.0))
    expected = [permute(place, 100, mix(3, pass_)) for pass_ in range(2) for place in range(100)]
    assert [order.draw(position).window for position in range(200)] == expected


def test_a_draw_has_its_own_chance() -> None:
    order = one_era(3, a=(100, 1.0))
    assert order.draw(117) == Draw(117, 1, order.draw(117).window)
    first, again, next_ = (order.draw(position).generator(3).random(4).tolist() for position in (5, 5, 6))
    assert first == again != next_


def test_ten_billion_windows_take_no_memory_and_no_time() -> None:
    sessions = {"d/a": (range(6 * 10**9), 1.0), "d/b": (range(6 * 10**9, 10**10), 2.0)}
    tracemalloc.start()
    more = {**sessions, "d/c": (range(10**10, 3 * 10**10), 0.5)}
    order = Order(go_on([], sessions, 0), more, 3, position=7 * 10**9)
    drawn = [order.draw(position).window for position in range(0, 10**11, 10**8 + 7)]
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert len(set(drawn)) > 990 and max(drawn) >= 2 * 10**10
    windows = Windows(*[np.array([n]) for n in (0, 0, 10**18, 10**10)], stride_ns=TOKEN_NS, context_ns=TOKEN_NS)
    assert windows.of_sessions() == {0: range(10**10)}
    assert windows.locate(10**10 - 1) == (0, (10**10 - 1) * TOKEN_NS)


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


def samples_in_order(store: Path, run: RunConfig, world_size: int, first_step: int = 0) -> list[dict[str, Tensor]]:
    """Every sample of a run, in the order of positions, from the batches of all its ranks."""
    per_step = run.train.global_batch_size // world_size // run.train.micro_batch_size
    ranks = [collected(store, run, rank, world_size, first_step) for rank in range(world_size)]
    assert all(len(rank) == (run.train.num_steps - first_step) * per_step for rank in ranks)
    in_order = [
        batch
        for step in range(run.train.num_steps - first_step)
        for rank in ranks
        for batch in rank[step * per_step : (step + 1) * per_step]
    ]
    return [
        {name: column[i] for name, column in batch.items()} for batch in in_order for i in range(len(batch["labels"]))
    ]


def shaped(world_size: int, accumulation: int, num_workers: int) -> RunConfig:
    """A run of three steps of 24 windows, cut into ranks and micro-batches."""
    run = tiny_run(
        num_steps=3,
        global_batch_size=24,
        micro_batch_size=24 // world_size // accumulation,
        families=("co_smoothing+decoding", "inpainting", "encoding@0.5"),
    )
    return replace(run, data=replace(run.data, num_workers=num_workers))


@pytest.fixture(scope="module")
def expected(store: Path) -> list[dict[str, Tensor]]:
    return samples_in_order(store, shaped(1, 1, 0), 1)


def invariant(
    store: Path, expected: list[dict[str, Tensor]], shape: tuple[int, int, int], first_steps: tuple[int, ...]
) -> None:
    """Session, window, mask, units and all else of every sample, from the start and after a resume."""
    for first_step in first_steps:
        found = samples_in_order(store, shaped(*shape), shape[0], first_step)
        assert_same(found, expected[24 * first_step :])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_samples_are_the_same_for_any_number_of_ranks_and_micro_batches(
    store: Path, expected: list[dict[str, Tensor]], world_size: int, accumulation: int
) -> None:
    invariant(store, expected, (world_size, accumulation, 0), first_steps=(0, 1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")  # more than a small machine has
@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_samples_are_the_same_for_any_number_of_loader_processes(
    store: Path, expected: list[dict[str, Tensor]], world_size: int, accumulation: int, num_workers: int
) -> None:
    first_steps = (0, 1) if (world_size, num_workers) == (2, 1) else (0,)  # each rank starts its processes anew
    invariant(store, expected, (world_size, accumulation, num_workers), first_steps)


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


def test_the_curriculum_lengthens_windows_at_its_steps(store: Path) -> None:
    stages = (ContextFrom(from_step=2, context_s=1.0), ContextFrom(from_step=4, context_s=1.5))
    run = tiny_run(num_steps=6, families=("inpainting", "co_smoothing@0.3"), context_schedule=stages)
    run = replace(run, data=replace(run.data, context_s=0.5))
    assert [run.turn(step).context_s for step in range(6)] == [0.5, 0.3, 1.0, 0.3, 1.5, 0.3]
    samples = TrainingSamples(store, run, model_config(run))
    assert samples.windows.context_ns == 1_500_000_000
    shapes: dict[tuple[str, float], set[tuple[int, ...]]] = {}
    for number, batch in enumerate(batches(samples, 0, 0, 1)):
        turn = run.turn(number // 2)
        times_s = batch["query_time_s"][batch["label_mask"].any(-1)]
        assert times_s.min() >= 0 and turn.context_s - 0.3 < times_s.max() < turn.context_s
        shapes.setdefault((turn.mix, turn.context_s), set()).add(tuple(batch["input_values"].shape))
    assert len(shapes) == 4 and all(len(found) == 1 for found in shapes.values())


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
