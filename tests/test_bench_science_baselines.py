"""The baselines: what they see, that they find what was planted, and that the test block's truth never reaches them.

In: recordings made here. Out: nothing.
"""

import dataclasses

import numpy as np
import pytest
import torch
from bench.science import baselines, networks, protocol, regressions, windows
from bench.science.networks import Mlp, Recipe
from bench.science.recordings import Recording

SPIKE_TASKS = ("hd_acausal", "hd_causal", "cosmooth", "forecast")


def turning(length_s: float = 160.0, num_units: int = 8, seed: int = 0) -> Recording:
    """An animal that turns, and units tuned to its heading; the last is tuned to nothing."""
    generator = np.random.default_rng(seed)
    time = 500.0 + np.arange(0.0, length_s, 0.005)
    turn = np.convolve(generator.normal(0, 0.3, len(time)), np.ones(200) / 200, mode="same")
    heading = np.cumsum(turn) % (2 * np.pi)
    preferred = np.arange(num_units) * 2 * np.pi / (num_units - 1)
    rate_hz = 40 * np.exp(5 * (np.cos(heading[:, None] - preferred) - 1)) + 0.3
    rate_hz[:, -1] = 5.0
    spikes = [time[generator.random(len(time)) < rate * 0.005] + 0.002 for rate in rate_hz.T]
    return Recording(name="turning", spike_times=tuple(spikes), heading_time=time, heading=heading)


def decaying(num_frames: int = 12000, num_rois: int = 3, seed: int = 0) -> Recording:
    """Traces of which all that can be foretold is their decay."""
    generator = np.random.default_rng(seed)
    traces = np.zeros((num_frames, num_rois))
    for k in range(1, num_frames):
        traces[k] = 0.9 * traces[k - 1] + generator.normal(size=num_rois)
    return Recording(name="decaying", trace_time=10 + np.arange(num_frames) / 30, traces=5 + 2 * traces)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    single = {name: of_task for name, of_task in baselines.BASELINES.items() if "mean of" not in name}
    monkeypatch.setattr(baselines, "BASELINES", single)
    torch.set_num_threads(1)


# ---------------------------------------------------------------- what is seen


@pytest.mark.parametrize("task", SPIKE_TASKS)
def test_spikes_outside_of_what_may_be_seen_change_nothing(task: str) -> None:
    recording = turning()
    time = protocol.queries(recording, task)[20:21]
    start, stop = {"hd_acausal": (-0.5, 0.5), "hd_causal": (-1, 0), "cosmooth": (-0.5, 0.5), "forecast": (-1.5, 0)}[
        task
    ]
    inside = [(s >= time + start) & (s < time + stop) for s in recording.spike_times]
    if task == "cosmooth":
        inside = [keep & (unit % 5 != 0) for unit, keep in enumerate(inside)]
    kept = tuple(s[keep] for s, keep in zip(recording.spike_times, inside, strict=True))
    seen = windows.see(recording, task, time, 0.02)
    without = windows.see(dataclasses.replace(recording, spike_times=kept), task, time, 0.02)
    assert seen.sum() > 0
    np.testing.assert_array_equal(without, seen)
    assert without.sum() == sum(len(s) for s in kept)


def test_frames_seen_end_with_the_query_and_those_asked_begin_behind_it() -> None:
    recording = decaying()
    time = protocol.queries(recording, "forecast_ca")[:3]
    index = np.searchsorted(recording.trace_time, time)
    seen, asked = (look(recording, "forecast_ca", time) for look in (lambda *a: windows.see(*a, 0.02), windows.ask))
    assert seen.shape[1:] == (45, 3) and asked.shape[1:] == (15, 3)
    np.testing.assert_array_equal(seen[:, -1], recording.traces[index])
    np.testing.assert_array_equal(asked[:, 0], recording.traces[index + 1])


@pytest.mark.parametrize("fold", [None, 0, 2])
@pytest.mark.parametrize("task", [*SPIKE_TASKS, "forecast_ca"])
def test_windows_to_learn_from_lie_in_their_own_block(task: str, fold: int | None) -> None:
    recording = decaying() if task == "forecast_ca" else turning()
    before, after = {"forecast": (1.5, 0.5), "forecast_ca": (44 / 30, 0.5)}.get(task, (1.0, 0.5))
    for split in ("train", "valid"):
        parts = recording.blocks(fold)[split]
        for time in windows.times(recording, task, split, fold):
            assert any(a - 1e-6 <= time - before and time + after <= b + 1e-6 for a, b in parts)


def test_recent_spikes_are_counted_from_the_last_lag_backwards() -> None:
    seen = np.zeros((1, 75, 1))
    seen[0, -1], seen[0, -4] = 2, 1
    counts = np.expm1(windows.recent(seen))[0, :, 0]
    assert counts.tolist() == pytest.approx([2, 2, 2] + [3] * 9)


def test_spikes_around_the_middle_are_the_same_from_both_sides() -> None:
    seen = np.random.default_rng(0).poisson(0.5, (2, 50, 3)).astype(float)
    past, future, both = np.split(windows.around(seen), 3, axis=1)
    mirrored = np.split(windows.around(seen[:, ::-1]), 3, axis=1)
    for found, expected in zip(mirrored, (future, past, both), strict=True):
        np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(np.expm1(both[:, -1]), seen.sum(1))


# ---------------------------------------------------------------- what is found


def test_ridge_finds_planted_weights_and_takes_a_strong_penalty_where_there_is_only_noise() -> None:
    generator = np.random.default_rng(0)
    inputs = {split: generator.normal(size=(400, 20, 1)) for split in ("train", "valid", "test")}
    weights = generator.normal(size=(20, 2))
    targets = {split: array[..., 0] @ weights + 3 for split, array in inputs.items()}
    np.testing.assert_allclose(regressions.ridge(inputs, targets), targets["test"], atol=0.1)
    noise = {split: generator.normal(size=(400, 2)) for split in inputs}
    assert np.abs(regressions.ridge(inputs, noise)).mean() < 0.1


def test_the_poisson_glm_finds_planted_rates() -> None:
    generator = np.random.default_rng(0)
    inputs = {split: generator.normal(size=(4000, 3, 2)).astype(np.float32) for split in ("train", "valid", "test")}
    weights = generator.normal(0, 0.4, size=(6, 2))
    rate = {split: np.exp(array.reshape(-1, 6) @ weights - 1) for split, array in inputs.items()}
    found = regressions.poisson_glm(inputs, {s: generator.poisson(r).astype(np.float32) for s, r in rate.items()})
    assert np.median(np.abs(found / rate["test"] - 1)) < 0.06


def test_a_network_keeps_the_pass_that_was_best_on_valid() -> None:
    generator = np.random.default_rng(0)
    inputs = {split: generator.normal(size=(64, 4, 4)).astype(np.float32) for split in ("train", "valid", "test")}
    noise = {split: generator.normal(size=(64, 1)).astype(np.float32) for split in inputs}  # it can only overfit
    torch.manual_seed(0)
    recipe = Recipe(dropout=0.0, input_dropout=0.0, passes=30, batch_size=16)
    network = Mlp(16, 1, recipe)
    mse = torch.nn.functional.mse_loss
    best = networks.fit(network, mse, inputs, noise, recipe)
    pairs = {split: [torch.from_numpy(each[split]) for each in (inputs, noise)] for split in inputs}
    assert mse(networks.say(network, pairs["valid"][0]), pairs["valid"][1]).item() == pytest.approx(best)
    assert mse(networks.say(network, pairs["train"][0]), pairs["train"][1]).item() > 0.1  # 30 passes learn it by heart


def test_every_baseline_of_a_turning_animal_is_far_above_chance() -> None:
    recording = turning()
    cpu_s: dict = {}
    found = baselines.baselines(recording, None, cpu_s)
    assert {name: set(of) for name, of in found.items()} == {
        "ridge": {"hd_acausal", "hd_causal"},
        "GLM": {"cosmooth", "forecast"},
        "MLP": set(SPIKE_TASKS),
        "GRU": {"forecast"},
    }
    assert set(cpu_s) == set(baselines.pairs(recording))
    for name, task in cpu_s:
        figures = protocol.score(recording, task, found[name][task])
        least = {"hd": 0.7, "cosmooth": 0.3, "forecast": 0.2}[protocol.KINDS[task]]
        assert figures["r2_circ" if task.startswith("hd") else "bps_train"] > least, (name, task, figures)


def test_every_baseline_of_traces_finds_their_decay() -> None:
    recording = decaying()
    for name, of_task in baselines.baselines(recording, 1).items():
        figures = protocol.score(recording, "forecast_ca", of_task["forecast_ca"], "test", 1)
        assert 0.2 < figures["skill_vs_persistence"] < 0.6, (name, figures)


# ---------------------------------------------------------------- what must not matter


@pytest.mark.parametrize(
    ("name", "task"), [("ridge", "hd_acausal"), ("MLP", "hd_causal"), ("GLM", "cosmooth"), ("GRU", "forecast")]
)
def test_the_truth_of_the_test_block_does_not_reach_a_baseline(name: str, task: str) -> None:
    recording = turning(length_s=80.0)
    start, stop = recording.blocks()["test"][0]
    if task.startswith("hd"):
        inside = (recording.heading_time >= start) & (recording.heading_time <= stop)
        other = dataclasses.replace(recording, heading=np.where(inside, 1.0, recording.heading))
    else:  # of a forecast what comes after the last query, else the held-out units
        late = start if task == "cosmooth" else protocol.queries(recording, task)[-1]
        keep = range(recording.num_units) if task == "forecast" else protocol.held_out(recording)
        cut = [s[s < late] if unit in keep else s for unit, s in enumerate(recording.spike_times)]
        other = dataclasses.replace(recording, spike_times=tuple(cut))
    said, again = (baselines.BASELINES[name][task](each, task, None) for each in (recording, other))
    np.testing.assert_array_equal(said, again)


def test_the_same_run_says_the_same() -> None:
    recording = turning(length_s=80.0)
    said, again = (networks.predict_heading(recording, "hd_acausal", None, num_seeds=2) for _ in range(2))
    np.testing.assert_array_equal(said, again)
