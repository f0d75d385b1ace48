"""Where a step's time goes, and what it used: phases do not overlap, counts are those of the data.

In: phases by a clock that the test moves, batches of a tiny store. Out: seconds, unit-hours, operations.
"""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import Work
from train_builders import tiny_run, tiny_store

from train import timing, usage
from train.build import model_config
from train.dataset import collate
from train.flops import Shape, training_flops
from train.loader import TrainingSamples
from train.timing import StepTimer

CPU = torch.device("cpu")


class Clock:
    """Stands still unless it is moved."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def perf_counter(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    own = Clock()
    monkeypatch.setattr(timing, "time", own)
    return own


def test_a_phase_inside_another_stops_its_clock(clock: Clock) -> None:
    timer = StepTimer(CPU)
    clock.sleep(5)
    with timer.phase("forward"):
        clock.sleep(1)
        with timer.phase("communication"):
            clock.sleep(2)
        clock.sleep(4)
    clock.sleep(8)
    with timer.phase("forward"):
        clock.sleep(16)
    expected = dict.fromkeys(timer.phases, 0.0) | {"forward": 21.0, "communication": 2.0}
    assert timer.seconds() == expected
    assert timer.seconds() == dict.fromkeys(timer.phases, 0.0), "the count begins anew"


def test_a_phase_that_fails_ends(clock: Clock) -> None:
    timer = StepTimer(CPU)
    with pytest.raises(KeyError), timer.phase("backward"):
        clock.sleep(3)
        raise KeyError
    clock.sleep(9)
    assert timer.seconds()["backward"] == 3


def test_another_thread_is_not_timed(clock: Clock) -> None:
    timer = StepTimer(CPU)

    def other() -> None:
        with timer.phase("optimizer"):
            clock.sleep(7)

    with timer.phase("data_wait"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert timer.seconds() == dict.fromkeys(timer.phases, 0.0) | {"data_wait": 7.0}


def test_waiting_for_a_collective_is_communication(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Work, "wait", lambda work, timeout=0: clock.sleep(timeout) or "done")
    timer = StepTimer(CPU)
    timer.time_collectives()
    with timer.phase("backward"):
        clock.sleep(1)
        waited: Any = Work.wait(None, 6)  # type: ignore[arg-type]  # the stand-in needs no work
    assert waited == "done"
    assert (timer.seconds()["backward"], timer.phases) == (1, (*timer.phases[:3], "communication", "optimizer"))


class Event:
    """Stands for an event in a GPU's stream: when it is reached, by the test's clock."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self.at_s = clock, 0.0

    def record(self) -> None:
        self.at_s = self._clock.now_s

    def elapsed_time(self, other: "Event") -> float:
        return (other.at_s - self.at_s) * 1e3


def test_on_a_gpu_events_in_its_stream_are_the_clock(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(clock))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(clock.now_s))
    timer, wait = StepTimer(torch.device("cuda")), Work.wait
    timer.time_collectives()
    assert Work.wait is wait and "communication" not in timer.phases
    with timer.phase("forward"):
        clock.sleep(2)
    assert timer.seconds()["forward"] == 2 and waits == [102.0], "read only when the device has got there"


# ---------------------------------------------------------------- what a step used


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> TrainingSamples:
    run = tiny_run()
    return TrainingSamples(tiny_store(tmp_path_factory.getbasetemp()), run, model_config(run))


def test_unit_hours_are_those_of_units_that_are_seen_or_asked(samples: TrainingSamples) -> None:
    for first in range(0, 40, 4):
        pair = [samples[first], samples[first + 1]]
        batch, expected = collate(pair), 0
        for one in pair:
            asked = one["label_mask"].any(-1)
            used = {*one["input_source"][one["input_mask"]].tolist(), *one["query_source"][asked].tolist()}
            expected += sum(one["source_modality"][source] < 2 for source in used)
        assert usage.num_units(batch) == expected
        assert usage.of_step([batch], 1.0, samples.model)["unit_hours"] == expected / 3600


def test_operations_are_those_of_what_is_visible(samples: TrainingSamples) -> None:
    batch = collate([samples[0], samples[1]])
    seen = round(int(batch["input_mask"].sum()) / 2)
    shape = Shape(
        batch=2,
        sources=batch["source_modality"].shape[1],
        tokens=seen,
        frames=round(int(batch["frame_mask"].sum()) / 2),
        context_s=1.0,
    )
    used = usage.of_step([batch, batch], 1.0, samples.model)
    assert used["flops"] == 2 * sum(training_flops(samples.model, shape).values())
    assert used["tokens"] == 2 * usage.batch_tokens(batch)
    batch["input_mask"][:] = False
    assert usage.of_step([batch, batch], 1.0, samples.model)["flops"] < used["flops"], "padding is no use"


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GB200", 2250e12),
        ("Another card", None),
    ],
)
def test_the_peak_is_the_data_sheets(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    half = tiny_run(precision="bf16")
    assert usage.peak_flops(half, torch.device("cuda")) == peak
    assert usage.peak_flops(tiny_run(), torch.device("cuda")) is None, "the table is of bf16"
    assert usage.peak_flops(half, CPU) is None
    assert usage.peak_flops(replace(half, peak_tflops=2.0), CPU) == 2e12


def test_the_memory_of_a_process_is_in_bytes() -> None:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    most = int(status["VmHWM"].split()[0]) * 1024
    assert abs(usage.peak_memory_bytes(CPU) - most) < 0.05 * most
