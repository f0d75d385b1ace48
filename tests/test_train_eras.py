"""Sessions that come later: exactly once in a pass across the border, and the same order before it.

In: sessions of so many windows, positions of resumes. Out: which window stands where.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from store_builders import target, write_plan
from torch import Tensor
from train_builders import prepare_run, tiny_run, tiny_session, train_ranks

from prep import catalog
from prep.settings import ConfigError
from train.build import model_config
from train.config import Weights
from train.eras import Era, Order, Orders, eras_from, go_on
from train.loader import TrainingSamples, batches

SEED = 5
Spans = dict[str, tuple[range, float]]


def spans(**sessions: int | tuple[int, float]) -> Spans:
    """Sessions of so many windows, each with its weight, in the order of the catalog."""
    found, first = {}, 0
    for key in sorted(sessions):
        num_windows, weight = sessions[key] if isinstance(sessions[key], tuple) else (sessions[key], 1.0)
        found[key] = (range(first, first + num_windows), weight)
        first += num_windows
    return found


def named(order: Order | Orders, sessions: Spans, positions: Iterable[int]) -> list[tuple[str, int]]:
    """Session and place of the windows at some positions: the same whatever joins before or after it."""
    drawn = [order.draw(position).window for position in positions]
    keys = [next(key for key, (span, _) in sessions.items() if window in span) for window in drawn]
    return [(key, window - sessions[key][0].start) for key, window in zip(keys, drawn, strict=True)]


OLD, NEW = spans(b=30, d=20), spans(a=7, b=30, c=13, d=20)


@pytest.mark.parametrize("border", [1, 17, 49, 50, 51, 125, 250])
def test_across_the_border_every_window_comes_exactly_once_in_a_pass(border: int) -> None:
    first = go_on([], OLD, 0)
    order = Order(first, NEW, SEED, border)
    before = named(Order(first, OLD, SEED), OLD, range(border))
    assert named(order, NEW, range(border)) == before, "what was seen stays what it was"
    seen = before[border // 50 * 50 :]
    num_mixed = 50 - len(seen) + 20
    mixed = named(order, NEW, range(border, border + num_mixed))
    everything = {(key, place) for key, (span, _) in NEW.items() for place in range(len(span))}
    assert sorted(seen + mixed) == sorted(everything)
    later = [named(order, NEW, range(begin, begin + 70)) for begin in range(border + num_mixed, border + 300, 70)]
    assert all(sorted(one) == sorted(everything) for one in later)
    assert len({tuple(one) for one in later}) == len(later)
    passes = [order.draw(position).pass_ for position in range(border + num_mixed + 1)]
    assert passes == sorted(passes) and passes[-1] == border // 50 + 1


def test_new_windows_are_spread_over_the_pass_that_they_join() -> None:
    sessions = spans(a=500, b=500)
    order = Order(go_on([], spans(a=500), 0), sessions, SEED, 100)
    mixed = [key for key, _ in named(order, sessions, range(100, 1000))]
    assert all(0.4 < mixed[begin : begin + 300].count("b") / 300 < 0.7 for begin in (0, 300, 600))


def test_sessions_may_join_again_and_again_also_within_one_pass() -> None:
    steps = [
        (0, spans(b=30)),
        (10, spans(b=30, c=20)),
        (25, spans(a=5, b=30, c=20)),
        (300, spans(a=5, b=30, c=20, d=9)),
    ]
    eras: list[Era] = []
    for position, sessions in steps:
        eras = go_on(eras, sessions, position)
    last = steps[-1][1]
    order = Order(eras, last, SEED)
    assert Counter(named(order, last, range(55))) == Counter(named(order, last, range(55, 110)))
    assert set(Counter(named(order, last, range(55))).values()) == {1}
    around = named(order, last, range(275, 275 + 64))  # the sixth pass, which d joins
    assert len(set(around)) == 64 and sum(key == "d" for key, _ in around) == 9


def test_weights_hold_across_the_border() -> None:
    old, new = spans(a=(10, 2.0), b=(5, 1.0)), spans(a=(10, 2.0), b=(5, 1.0), c=(4, 3.0))
    order = Order(go_on([], old, 0), new, SEED, 12)
    expected = {"a": 20, "b": 5, "c": 12}
    assert Counter(key for key, _ in named(order, new, range(37))) == expected
    assert set(Counter(named(order, new, range(37))).values()) == {1, 2, 3}
    assert Counter(key for key, _ in named(order, new, range(37, 74))) == expected


def test_nothing_new_begins_no_era_and_state_survives_json() -> None:
    eras = go_on(go_on([], OLD, 0), NEW, 17)
    assert go_on(eras, NEW, 40) == eras and [era.first_position for era in eras] == [0, 17]
    state = json.loads(json.dumps({"eras": Order(eras, NEW, SEED).state}, sort_keys=True))
    assert eras_from(state) == eras
    assert eras_from({"position": 7}) == [], "checkpoints that are older than eras"
    assert go_on([], NEW, 40) == [Era(0, {key: (len(span), 1.0) for key, (span, _) in NEW.items()})]


@pytest.mark.parametrize(
    ("sessions", "message"),
    [
        (spans(d=20), r"no longer has 1 of the sessions that this run has trained on: b\. .* Put them back"),
        (spans(b=31, d=20), r"Session b has 31 windows of the train split, but had 30 when this run began with it"),
        (
            spans(b=30, d=(20, 2.0)),
            r"Session d has weight 2, but had 1 when this run began with it\. Leave data\.weights",
        ),
    ],
)
def test_a_run_keeps_the_sessions_that_it_has(sessions: Spans, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        go_on(go_on([], OLD, 0), sessions, 17)


TURNS, BATCH_SIZE = ("encoding", "leave_out+decoding", "encoding"), 6


def at(mix: str, steps: range) -> list[int]:
    """The positions of a mix's turns in some steps."""
    return [step * BATCH_SIZE + n for step in steps if TURNS[step % 3] == mix for n in range(BATCH_SIZE)]


def orders(position: int = 0, begun: Iterable[Era] = (), **sessions: tuple[int, float]) -> tuple[Orders, Spans]:
    """Those of a run whose second turn in three never sees session `b`."""
    all_turns = spans(**sessions)
    own = {key: (span, 0.0 if key == "b" else weight) for key, (span, weight) in all_turns.items()}
    everything = {"": all_turns, "leave_out+decoding": own}
    return Orders(list(begun), everything, TURNS, BATCH_SIZE, SEED, position), all_turns


def test_turns_whose_sessions_have_weights_of_their_own_take_each_window_once_in_a_pass_of_their_own() -> None:
    order, sessions = orders(a=(30, 1.0), b=(12, 2.0))
    assert (order.num_tickets(), order.num_tickets("leave_out+decoding")) == (54, 30)
    own, others = at("leave_out+decoding", range(15)), at("encoding", range(18))
    assert sorted(named(order, sessions, own)) == [("a", place) for place in range(30)]
    first_pass = Counter(named(order, sessions, others[:54]))
    assert first_pass == {("a", place): 1 for place in range(30)} | {("b", place): 2 for place in range(12)}
    assert [order.draw(position).position for position in own] == own, "chance is drawn by the place in the run"


def test_without_weights_of_their_own_turns_have_one_order() -> None:
    order, one = Orders([], {"": OLD}, TURNS, BATCH_SIZE, SEED), Order([], OLD, SEED)
    assert [order.draw(position) for position in range(200)] == [one.draw(position) for position in range(200)]


def test_a_session_that_joins_comes_into_the_turns_of_all() -> None:
    first, old = orders(a=(30, 1.0), b=(12, 2.0))
    border = 7 * BATCH_SIZE  # two turns of the mix and five others have been
    eras = eras_from(json.loads(json.dumps({"eras": first.state})))
    order, sessions = orders(border, eras, a=(30, 1.0), b=(12, 2.0), c=(18, 1.0))
    assert named(order, sessions, range(border)) == named(first, old, range(border)), "what was seen stays what it was"
    everything = {"a": 30, "b": 24, "c": 18}
    own = named(order, sessions, at("leave_out+decoding", range(24)))
    assert sorted(own) == [(key, place) for key in "ac" for place in range(everything[key])]
    others = named(order, sessions, at("encoding", range(18)))
    assert Counter(key for key, _ in others) == everything
    again, _ = orders(90, eras_from({"eras": order.state}), a=(30, 1.0), b=(12, 2.0), c=(18, 1.0))
    assert named(again, sessions, range(300)) == named(order, sessions, range(300))


def store_of(root: Path, *session_ids: str) -> Path:
    """A store of tiny sessions; each has its own bytes whatever stands beside it."""
    (root.parent / "recording.txt").write_text("stands for an NWB file")
    for session_id in session_ids:
        plan = tiny_session(root.parent / "recording.txt", "full", len(session_id))
        units = replace(plan.units, unit_key=[f"d1/{session_id}/{i}" for i in range(len(plan.units.unit_key))])
        plan = replace(plan, session_id=session_id, units=units)
        if not (root / "d1" / f"{session_id}.zarr").exists():
            write_plan(plan, target(root, plan))
    catalog.write(root)
    return root


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_reads_the_same_across_the_border(tmp_path: Path, world_size: int) -> None:
    run = tiny_run(num_steps=12, global_batch_size=6, micro_batch_size=1, families=("co_smoothing",))
    store = store_of(tmp_path / "store", "ma", "mice")
    first = TrainingSamples(store, run, model_config(run))
    state, old = first.order.state, values(first, 0)
    store_of(tmp_path / "store", "ant", "monkey")
    weighted = replace(run, data=replace(run.data, weights=Weights(sessions={"d1/monkey": 2.0})))
    again = TrainingSamples(store, weighted, model_config(run))
    again.go_on({"eras": state, "position": 5 * 6})
    assert [era["first_position"] for era in again.order.state] == [0, 30]
    one = values(again, 0)
    assert all(a.equal(b) for a, b in zip(one[:30], old[:30], strict=True))
    ranks = [values(again, 5, rank, world_size) for rank in range(world_size)]
    size = 6 // world_size
    together = [part for step in range(7) for rank in ranks for part in rank[step * size : (step + 1) * size]]
    assert len(one) == 72 and len(together) == 42
    assert all(a.equal(b) for a, b in zip(one[30:], together, strict=True))


def values(samples: TrainingSamples, first_step: int, rank: int = 0, world_size: int = 1) -> list[Tensor]:
    """What one rank sees, micro-batch by micro-batch."""
    feed = batches(samples, first_step, rank, world_size)
    return [batch["input_values"].nan_to_num(99) for batch in feed]


@pytest.mark.slow
def test_ranks_go_on_with_the_sessions_that_were_added(tmp_path: Path) -> None:
    run = replace(tiny_run(num_steps=3), checkpoint_every=3, keep_checkpoints=5)
    store = store_of(tmp_path / "store", "ma", "mice")
    out = prepare_run(tmp_path / "run", store, run)
    assert train_ranks(out) == 0
    store_of(store, "ant")
    longer = replace(run, train=replace(run.train, num_steps=6))
    prepare_run(out, store, longer)
    assert train_ranks(out, slots=1) == 0
    eras = [
        json.loads((out / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())["eras"] for step in (3, 6)
    ]
    assert [[era["first_position"] for era in found] for found in eras] == [[0], [0, 12]]
    assert eras[1][0] == eras[0][0] and list(eras[1][1]["sessions"]) == ["d1/ant"]
