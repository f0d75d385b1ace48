"""What the hub folder is shown of a recording by the bench: all that a task admits, and not one spike more.

In: a made recording, a stand-in for the hub folder that keeps what it is given. Out: what moves its answers.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bench.science import brainloom, pretrain, protocol
from bench.science.brainloom import SEEN_S, predict, recipe
from bench.science.recordings import Recording

from train import config
from train.build import model_config
from train.model.processing_brainloom import BrainloomProcessor, Stream
from train.pretrained import differing

NUM_UNITS, PERIOD_S = 7, 100.0
ADMITTED = {"hd_acausal": (-0.5, 0.5), "hd_causal": (-1.0, 0.0), "cosmooth": (-0.5, 0.5), "forecast": (-1.5, 0.0)}
EDGE_S = 1e-6


class Shown:
    """Stands for the hub folder: keeps what it is shown, and answers the right number of numbers."""

    def __init__(self) -> None:
        self.processor = BrainloomProcessor()
        self.windows: list[list[Stream]] = []

    def keys(self, modality: int) -> list[str]:
        names = {0: [f"unit{u}" for u in range(NUM_UNITS)], 1: ["roi0", "roi1"], 2: ["d/heading/cos", "d/heading/sin"]}
        return names[modality]

    def stream(self, keys: list[str], modality: str, values: np.ndarray, start_s: np.ndarray, **more: Any) -> Stream:
        stream: Stream = brainloom.Hub.stream(self, keys, modality, values, start_s, **more)
        return stream

    def ask(self, windows: list[list[Stream]], context_s: float) -> np.ndarray:
        self.windows = windows
        asked = sum(int(stream.asked.sum()) for stream in windows[0])
        return np.zeros((len(windows), asked, 12))

    def first_s(self) -> float:
        """Where in the first window the first token lies that it shows."""
        return min(
            float(stream.start_s[stream.visible.any(1)].min()) for stream in self.windows[0] if stream.visible.any()
        )

    def visible(self) -> dict[str, list[tuple[float, float, float]]]:
        """(start, stop, count) of every sample that the first window shows, by source; seconds from the first."""
        seen: dict[str, list[tuple[float, float, float]]] = {}
        first_s = self.first_s()
        for stream in self.windows[0]:
            for k, s in zip(*np.nonzero(stream.visible), strict=True):
                for p, value in enumerate(stream.values[k, s]):
                    start = float(stream.start_s[k] + p * stream.sample_s) - first_s
                    seen.setdefault(stream.keys[s], []).append((start, start + stream.sample_s, float(value)))
        return seen


def made(seed: int = 0) -> Recording:
    generator = np.random.default_rng(seed)
    spikes = tuple(np.sort(generator.uniform(0, PERIOD_S, 400)) for _ in range(NUM_UNITS))
    time = np.arange(0, PERIOD_S, 1 / 120)
    frames = np.arange(0, PERIOD_S, 1 / 30)
    traces = generator.normal(size=(len(frames), 2))
    return Recording(
        name="made", spike_times=spikes, heading_time=time, heading=time % 6, trace_time=frames, traces=traces
    )


@pytest.mark.parametrize("task", SEEN_S)
def test_a_task_is_shown_the_spikes_that_it_admits_and_no_other(task: str) -> None:
    recording, hub, time = made(), Shown(), np.array([50.0137])
    predict(hub, recording, task, time)
    begin, stop = ADMITTED[task]
    hidden = protocol.held_out(recording) if task == "cosmooth" else []
    seen = hub.visible()
    assert set(seen) == {f"unit{u}" for u in range(NUM_UNITS) if u not in hidden}
    for unit in set(range(NUM_UNITS)) - set(hidden):
        samples = seen[f"unit{unit}"]
        spikes = recording.spike_times[unit] - time[0]
        assert sum(count for *_, count in samples) == ((spikes >= begin) & (spikes < stop)).sum()
        for start, end, count in samples:
            inside = (spikes - begin >= start - EDGE_S) & (spikes - begin < end - EDGE_S)
            assert start >= -EDGE_S and end <= stop - begin + EDGE_S and count == inside.sum()


def test_what_is_asked_stands_where_the_protocol_asks() -> None:
    recording, time = made(), np.array([50.0137])
    asked = {}
    for task in SEEN_S:
        hub = Shown()
        predict(hub, recording, task, time)
        stream = next(s for s in hub.windows[0] if s.asked.any())
        begins = stream.start_s[stream.asked.any(1)] - hub.first_s() + ADMITTED[task][0]
        asked[task] = (stream.modality, len(stream.keys), begins.round(9).tolist())
        assert np.isnan(stream.values[stream.asked]).all()
    assert asked["hd_acausal"] == asked["hd_causal"] == ("behavior", 2, [0.0])
    assert asked["cosmooth"] == ("spikes", 2, [-protocol.BIN_S / 2])
    assert asked["forecast"] == ("spikes", NUM_UNITS, [0.0, 0.1, 0.2, 0.3, 0.4])


def test_a_forecast_of_traces_is_shown_its_last_45_frames() -> None:
    recording, hub = made(), Shown()
    predict(hub, recording, "forecast_ca", recording.trace_time[[1000]])
    (stream,) = hub.windows[0]
    shown = stream.values[stream.visible].reshape(15, 2, 3).transpose(0, 2, 1).reshape(45, 2)
    np.testing.assert_array_equal(shown, recording.traces[956:1001].astype(np.float32))
    assert np.isnan(stream.values[stream.asked]).all() and stream.asked.sum() == 5 * 2


@pytest.mark.parametrize("fold", [None, 0, 2])
def test_the_recipe_has_the_blocks_of_the_split(fold: int | None) -> None:
    recording = made()
    pieces = recipe(recording, fold)["splits"]["explicit"]
    for split, parts in recording.blocks(fold).items():
        assert [(p["start_s"], p["stop_s"]) for p in pieces if p["label"] == split] == parts
    assert "exclude" not in recipe(replace(recording, heading=np.zeros(0)), fold)


def test_a_pretrained_model_is_of_the_architecture_that_is_fine_tuned() -> None:
    before = model_config(config.load(pretrain.RUN))
    for name in pretrain.ASKED:
        assert not differing(before, model_config(config.load(brainloom.HERE / brainloom.RUNS[name]))), name
