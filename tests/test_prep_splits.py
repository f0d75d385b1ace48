"""Splits by trial, session, subject and stimulus: labels that depend on names alone, blocks that keep their distance.

In: tables of intervals, random ones too; files that nwb_builders writes. Out: nothing.
"""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from nwb_builders import plan, running, with_units
from pynwb import NWBFile
from pynwb.epoch import TimeIntervals
from pynwb.file import Subject

from prep.nwb.splits import draw_label, row_blocks, stimulus_names
from prep.plan import PrepError
from prep.recipe import Span, Splits
from prep.settings import SPLITS

S = 1_000_000_000
TRAIN, VALID, TEST = range(3)
SEEDS = range(60)

Rows = list[tuple[float, float, int]]


def blocks(rows: Rows, gap_s: float = 0.0, is_bridged: bool = False) -> list[tuple[float, float, str]]:
    """row_blocks in seconds."""
    start, stop, label = (np.array(column) for column in zip(*rows, strict=True))
    found = row_blocks(np.int64(start * S), np.int64(stop * S), label.astype(np.int64), int(gap_s * S), is_bridged)
    return [(begin / S, end / S, name) for begin, end, name in found]


def table(rows: list[tuple[float, float, object]], name: str = "images", **more: object) -> Callable[[NWBFile], None]:
    """Units from 0 to 100 s, and a table of presentations."""

    def fill(nwb: NWBFile) -> None:
        with_units([0.0, 100.0])(nwb)
        intervals = TimeIntervals(name=name, description="d")
        intervals.add_column("image_name", "d")
        for start, stop, image in rows:
            intervals.add_interval(start_time=start, stop_time=stop, image_name=image)
        nwb.add_time_intervals(intervals)

    return fill


def trials(num_trials: int, length_s: float = 4.0, every_s: float = 5.0) -> Callable[[NWBFile], None]:
    def fill(nwb: NWBFile) -> None:
        with_units([0.0, num_trials * every_s])(nwb)
        for i in range(num_trials):
            nwb.add_trial(start_time=i * every_s, stop_time=i * every_s + length_s)

    return fill


# ---------------------------------------------------------------- labels


def test_a_label_is_drawn_from_the_name_alone():
    """Pinned: other labels would move sessions that people have trained on from one split to another."""
    drawn = [draw_label(f"im{i:03}", (0.5, 0.25, 0.25)) for i in range(8)]
    assert drawn == ["test", "train", "test", "test", "train", "train", "train", "train"]


def test_labels_come_in_the_fractions_that_were_asked_for():
    drawn = [draw_label(f"name-{i}", (0.7, 0.1, 0.2)) for i in range(20_000)]
    shares = [drawn.count(label) / len(drawn) for label in SPLITS]
    assert np.abs(np.array(shares) - (0.7, 0.1, 0.2)).max() < 0.02


@pytest.mark.parametrize("fractions", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 0.0, 0.5)])
def test_a_fraction_of_zero_draws_no_label(fractions: tuple[float, ...]):
    drawn = {draw_label(f"name-{i}", fractions) for i in range(2_000)}
    assert drawn == {label for label, part in zip(SPLITS, fractions, strict=True) if part > 0}


def test_a_stimulus_is_named_by_its_text_or_its_number_and_a_blank_by_nothing():
    assert stimulus_names(["im001 ", "", "a"]) == ["im001", "", "a"]
    assert stimulus_names(np.array([45.0, np.nan, 0.04, 118.0])) == ["45", "", "0.04", "118"]


# ---------------------------------------------------------------- rows to blocks


def test_neighbours_of_two_labels_give_way_by_half_of_what_lacks_to_the_gap():
    assert blocks([(0, 10, TRAIN), (11, 20, TEST)], gap_s=2) == [(0, 9.5, "train"), (11.5, 20, "test")]
    assert blocks([(0, 10, TRAIN), (12, 20, TEST)], gap_s=2) == [(0, 10, "train"), (12, 20, "test")]


def test_neighbours_of_one_label_are_merged_where_they_touch_and_across_a_pause_if_bridged():
    rows = [(0, 1, TRAIN), (1, 2, TRAIN), (3, 4, TRAIN), (5, 6, TEST)]
    assert blocks(rows) == [(0, 2, "train"), (3, 4, "train"), (5, 6, "test")]
    assert blocks(rows, is_bridged=True) == [(0, 4, "train"), (5, 6, "test")]


def test_time_that_two_labels_claim_belongs_to_neither():
    assert blocks([(0, 10, TRAIN), (5, 15, TEST)]) == [(0, 5, "train"), (10, 15, "test")]
    assert blocks([(0, 10, TRAIN), (4, 6, TEST)], is_bridged=True) == [(0, 4, "train"), (6, 10, "train")]


def test_a_short_row_that_vanishes_does_not_let_its_neighbour_come_nearer_than_the_gap():
    rows = [(0, 10, TRAIN), (10.5, 10.625, TRAIN), (11, 20, TEST)]
    assert blocks(rows, gap_s=2) == [(0, 9.8125, "train"), (11.8125, 20, "test")]


def random_rows(seed: int) -> Rows:
    """Overlapping, touching and lonely rows, in any order, on a grid that makes ties."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, 200, size=rng.integers(1, 40)) / 4
    lengths = rng.integers(1, 20, size=len(starts)) / 4
    labels = rng.integers(0, 3, size=len(starts))
    return [(float(a), float(a + n), int(label)) for a, n, label in zip(starts, lengths, labels, strict=True)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("is_bridged", [False, True])
def test_blocks_of_random_rows_keep_the_gap_and_never_hold_time_of_another_label(seed: int, is_bridged: bool):
    rows, gap_s = random_rows(seed), float(np.random.default_rng(seed).integers(0, 5)) / 4
    found = blocks(rows, gap_s, is_bridged)
    assert found == sorted(found)
    assert all(start < stop for start, stop, _ in found)
    for (_, stop, before), (start, _, after) in itertools.pairwise(found):
        assert start - stop >= (gap_s if before != after else 0)
    for start, stop, name in found:
        others = [(a, b) for a, b, label in rows if SPLITS[label] != name]
        assert all(b <= start or stop <= a for a, b in others)
        if not is_bridged:
            inside = [(a, b) for a, b, label in rows if SPLITS[label] == name and a < stop and start < b]
            covered = np.zeros(4 * 60, bool)
            for a, b in inside:
                covered[int(a * 4) : int(b * 4)] = True
            assert covered[int(np.floor(start * 4)) : int(np.ceil(stop * 4))].all()


@pytest.mark.parametrize("seed", SEEDS)
def test_without_a_gap_each_moment_of_one_label_is_in_its_split(seed: int):
    rows = random_rows(seed)
    found = blocks(rows)
    for moment in np.arange(0.125, 60, 0.25):
        claims = {SPLITS[label] for start, stop, label in rows if start <= moment < stop}
        got = [label for start, stop, label in found if start <= moment < stop]
        assert got == (list(claims) if len(claims) == 1 else [])


@pytest.mark.parametrize("seed", SEEDS)
def test_the_order_of_rows_does_not_matter(seed: int):
    rows = random_rows(seed)
    shuffled = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    assert blocks(shuffled, 0.5, True) == blocks(rows, 0.5, True)


# ---------------------------------------------------------------- files


def test_trials_are_split_by_dataset_session_and_row(tmp_path: Path):
    session = plan(tmp_path, trials(40), splits=Splits(by="trial", gap_s=1))
    for start, stop, label in session.splits:
        rows = range(round(start / S / 5), -(-stop // (5 * S)))
        assert {draw_label(f"d1/s1/{row}", (0.7, 0.1, 0.2)) for row in rows} == {label}
    assert {label for *_, label in session.splits} == set(SPLITS)


def test_a_stimulus_has_one_label_wherever_it_is_shown(tmp_path: Path):
    rng = np.random.default_rng(1)
    shown = [f"im{i:03}" for i in rng.permutation(np.repeat(np.arange(12), 6))]
    rows = [(float(i), i + 1.0, image) for i, image in enumerate(shown)]
    splits = Splits(by="stimulus", table="images", column="image_name", gap_s=0)
    session = plan(tmp_path, table(rows), splits=splits)
    for start, stop, label in session.splits:
        images = {image for begin, end, image in rows if begin * S < stop and start < end * S}
        assert {draw_label(str(image), splits.fractions) for image in images} == {label}
    assert sum(stop - start for start, stop, _ in session.splits) == len(rows) * S


def test_a_stimulus_that_the_recipe_assigns_has_that_label_and_a_blank_has_none(tmp_path: Path):
    rows = [(0.0, 1.0, "a"), (1.0, 2.0, ""), (2.0, 3.0, "b"), (4.0, 5.0, "a")]
    chosen = {"a": "test", "b": "train"}
    splits = Splits(by="stimulus", table="intervals/images", column="image_name", gap_s=0, assign=chosen)
    session = plan(tmp_path, table(rows), splits=splits)
    assert session.splits == ((0, S, "test"), (2 * S, 3 * S, "train"), (4 * S, 5 * S, "test"))
    noted = [finding.message for finding in session.findings if finding.code == "short-session"]
    assert noted == ["no row of the table 'images' is valid (after gaps of 0 s between labels)"]


def named(subject_id: str = "", session_id: str = "") -> Callable[[NWBFile], None]:
    def fill(nwb: NWBFile) -> None:
        with_units([0.5, 100.0])(nwb)
        running(np.arange(50.0), starting_time=98.0, rate=10.0)(nwb)
        if subject_id:
            nwb.subject = Subject(subject_id=subject_id)
        nwb.session_id = session_id or None

    return fill


@pytest.mark.parametrize("by", ["session", "subject"])
def test_a_whole_session_has_one_label_from_its_name(tmp_path: Path, by: str):
    splits = Splits(by=by)
    label = draw_label("mouse-7", splits.fractions)
    session = plan(tmp_path, named(subject_id="mouse-7", session_id="mouse-7"), splits=splits)
    assert session.splits == ((5 * S // 10, 103 * S, label),)


def test_a_session_that_the_recipe_assigns_is_named_as_in_the_file(tmp_path: Path):
    for label in SPLITS:
        splits = Splits(by="session", assign={"a b/c": label})
        ((*_, found),) = plan(tmp_path, named(session_id="a b/c"), splits=splits).splits
        assert found == label


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (Splits(by="subject"), r"s1\.nwb has no subject_id, and the recipe splits by subject\. Exclude the file"),
        (Splits(by="trial"), r"s1\.nwb has no table 'trials' to split by trial; its tables of intervals: images"),
        (Splits(by="stimulus", table="movies"), r"no table 'movies' to split by stimulus; its tables.*: images"),
        (Splits(by="stimulus", table="images"), r"splits\.column is None, but the columns of .* are: image_name"),
        (
            Splits(by="stimulus", table="images", column="image_name", gap_s=9),
            r"no row of the table 'images' is left of 2 after gaps of 9 s between labels\. Lower splits\.gap_s",
        ),
    ],
)  # fmt: skip
def test_what_the_file_cannot_give_is_said_with_what_it_has(tmp_path: Path, splits: Splits, message: str):
    rows = [(0.0, 1.0, "im001"), (1.0, 2.0, "im003")]
    assert {draw_label(str(image), splits.fractions) for *_, image in rows} != {"train"}
    with pytest.raises(PrepError, match=message):
        plan(tmp_path, table(rows), splits=splits)


def test_explicit_pieces_win(tmp_path: Path):
    spans = (Span(label="test", start_s=1, stop_s=2),)
    assert plan(tmp_path, named(), splits=Splits(explicit=spans)).splits == ((S, 2 * S, "test"),)
