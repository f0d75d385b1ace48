"""Masks of the task families: who sees what, audited on real windows of every kind of session.

In: windows of a tiny store. Out: for every token, visible, asked, or neither.
"""

import numpy as np
import pytest
from train_builders import SESSIONS, one_window, reader_of, tiny_run, tiny_store

from train.config import FAMILIES, Family
from train.dataset import Window
from train.masking import (
    BEHAVIOR,
    FORECAST_FROM,
    HIDDEN_UNITS,
    TASKS,
    Mask,
    Task,
    TokenTable,
    draw_mask,
    encoding,
    forecasting,
    inpainting_blocks,
    is_activity,
    task_mask,
)
from train.modalities import MODALITIES

SEEDS = range(8)


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Window]:
    reader = reader_of(tiny_store(tmp_path_factory.getbasetemp()), tiny_run())
    return {session: one_window(reader, session) for session in SESSIONS}


def drawn(window: Window, family: Family) -> list[Mask]:
    return [draw_mask(family, window.tokens, 1.0, np.random.default_rng(seed)) for seed in SEEDS]


@pytest.mark.parametrize("session", SESSIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_token_is_both_visible_and_asked(windows: dict[str, Window], family: Family, session: str) -> None:
    for mask in drawn(windows[session], family):
        assert not (mask.visible & mask.asked).any()


@pytest.mark.parametrize("session", SESSIONS)
def test_co_smoothing_and_forecasting_and_decoding_see_activity_alone(windows: dict[str, Window], session: str) -> None:
    families: tuple[Family, ...] = ("co_smoothing", "forecasting", "decoding")
    activity = is_activity(windows[session].tokens)
    for mask in [mask for family in families for mask in drawn(windows[session], family)]:
        assert not mask.frames and not (mask.visible & ~activity).any()


@pytest.mark.parametrize("session", SESSIONS)
def test_encoding_sees_no_activity(windows: dict[str, Window], session: str) -> None:
    masks = drawn(windows[session], "encoding")
    activity = is_activity(windows[session].tokens)
    for mask in masks:
        assert not (mask.visible & activity).any() and (mask.asked == activity).all()
        assert (mask.visible == (windows[session].tokens.modality == BEHAVIOR)).all()
    assert {mask.frames for mask in masks} == {True, False}, "at times without the stimulus"


def test_decoding_asks_for_all_behaviour(windows: dict[str, Window]) -> None:
    for window in windows.values():
        (mask, *_) = drawn(window, "decoding")
        assert (mask.asked == (window.tokens.modality == BEHAVIOR)).all()
        assert (mask.visible == is_activity(window.tokens)).all()


def test_co_smoothing_hides_whole_units_and_never_all_of_them(windows: dict[str, Window]) -> None:
    for window in windows.values():
        tokens = window.tokens
        for mask in drawn(window, "co_smoothing"):
            hidden, seen = (set(tokens.source[chosen]) for chosen in (mask.asked, mask.visible))
            assert hidden and seen and not hidden & seen
            assert hidden | seen == set(tokens.source[is_activity(tokens)])
            assert len(hidden) <= max(1, round(HIDDEN_UNITS[1] * len(hidden | seen)))


@pytest.mark.parametrize("session", SESSIONS)
def test_a_forecast_sees_nothing_at_or_after_the_cut(windows: dict[str, Window], session: str) -> None:
    tokens = windows[session].tokens
    for cut_s in (0.4, 0.5, 0.55, 0.8):
        mask = forecasting(tokens, cut_s)
        assert tokens.stop_s[mask.visible].max() <= cut_s + 1e-9
        assert tokens.start_s[mask.asked].min() >= cut_s - 1e-9
        crossing = is_activity(tokens) & (tokens.start_s < cut_s - 1e-9) & (tokens.stop_s > cut_s + 1e-9)
        assert not (crossing & (mask.visible | mask.asked)).any()
    for mask in drawn(windows[session], "forecasting"):
        assert tokens.stop_s[mask.visible].max() <= tokens.start_s[mask.asked].min() + 1e-9
        last_s = tokens.stop_s[mask.visible].max()
        assert FORECAST_FROM[0] - 1e-9 <= last_s <= FORECAST_FROM[1] + 1e-9
        following = np.isclose(tokens.start_s, last_s) & is_activity(tokens)
        assert following.any() and mask.asked[following].all()  # what comes next is asked for


def test_a_token_that_crosses_the_cut_is_neither_seen_nor_asked() -> None:
    start_s = np.array([0.0, 0.1, 0.45, 0.5])
    tokens = TokenTable(np.zeros(4, np.int64), np.zeros(4, np.int64), start_s, start_s + 0.1)
    mask = forecasting(tokens, 0.5)
    assert mask.visible.tolist() == [True, True, False, False] and mask.asked.tolist() == [False, False, False, True]


def test_inpainting_hides_blocks_of_every_modality_and_sees_the_rest(windows: dict[str, Window]) -> None:
    window = windows["full"]
    masks = drawn(window, "inpainting")
    for mask in masks:
        assert mask.frames and (mask.visible == ~mask.asked).all()
    asked = np.any([mask.asked for mask in masks], axis=0)
    assert set(window.tokens.modality[asked]) == {0, BEHAVIOR}
    shares = [mask.asked.mean() for mask in masks]
    assert 0.1 < np.mean(shares) < 0.5


def test_a_window_without_tokens_has_empty_masks() -> None:
    none = np.zeros(0, np.int64)
    tokens = TokenTable(none, none, none.astype(float), none.astype(float))
    for family in FAMILIES:
        mask = draw_mask(family, tokens, 1.0, np.random.default_rng(0))
        assert len(mask.visible) == len(mask.asked) == 0
    assert len(inpainting_blocks(tokens, 1.0, np.random.default_rng(0))) == 0


def test_a_mask_is_a_function_of_the_samples_own_chance(windows: dict[str, Window]) -> None:
    for family in FAMILIES:
        for a, b in zip(drawn(windows["full"], family), drawn(windows["full"], family), strict=True):
            assert (a.visible == b.visible).all() and (a.asked == b.asked).all() and a.frames == b.frames


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.modality}-{task.family}-{'+'.join(task.visible)}")
def test_an_evaluation_task_sees_what_its_name_says_and_no_more(windows: dict[str, Window], task: Task) -> None:
    for window in windows.values():
        mask = task_mask(task, window.tokens, 1.0)
        allowed = [MODALITIES.index(name) for name in task.visible]
        assert set(window.tokens.modality[mask.visible]) <= set(allowed)
        assert set(window.tokens.modality[mask.asked]) <= {MODALITIES.index(task.modality)}
        assert mask.frames == ("stimulus" in task.visible)
        assert not (mask.visible & mask.asked).any()
        if task.family == "forecasting" and mask.asked.any():
            assert (
                window.tokens.stop_s[mask.visible].max() <= 0.5 + 1e-9 <= window.tokens.start_s[mask.asked].min() + 2e-9
            )


def test_encoding_on_the_stimulus_alone_hides_behaviour_too(windows: dict[str, Window]) -> None:
    mask = encoding(windows["full"].tokens, behavior=False, stimulus=True)
    assert not mask.visible.any() and mask.frames


@pytest.mark.parametrize("session", SESSIONS)
def test_a_mix_asks_for_what_any_asks_and_shows_what_all_show(windows: dict[str, Window], session: str) -> None:
    tokens = windows[session].tokens
    for seed in SEEDS:
        mix = draw_mask("co_smoothing+decoding", tokens, 1.0, np.random.default_rng(seed))
        alone = draw_mask("co_smoothing", tokens, 1.0, np.random.default_rng(seed))
        np.testing.assert_array_equal(mix.visible, alone.visible)
        np.testing.assert_array_equal(mix.asked, alone.asked | (tokens.modality == BEHAVIOR))
    nothing = draw_mask("encoding+decoding", tokens, 1.0, np.random.default_rng(0))
    assert not nothing.visible.any() and nothing.asked.all() and not nothing.frames
