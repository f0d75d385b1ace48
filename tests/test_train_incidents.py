"""What goes wrong and does not end the run: which losses are a spike, what is written down, when it is enough.

In: losses step by step, windows of one rank. Out: steps, rows of incidents.jsonl, a message.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore
from train_builders import tiny_run, tiny_store

from prep.settings import ConfigError
from train.build import model_config
from train.config import FaultConfig, Turn
from train.incidents import Incidents, TrainingError
from train.loader import TrainingSamples
from train.loss_watch import LossWatch

ENCODING, DECODING = Turn("encoding", 1.0), Turn("decoding", 1.0)


@pytest.fixture
def alone() -> Iterator[None]:
    """This process is the only rank."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def spikes(losses: list[float], **config: float) -> list[int | None]:
    """What is said of losses that encoding and decoding have in turn; decoding's are lower by 10."""
    watch = LossWatch(FaultConfig(**{"spike_factor": 6.0, "spike_steps": 3, **config}))
    turns = (ENCODING, DECODING)
    return [watch.spike(step, turns[step % 2], loss - 10 * (step % 2)) for step, loss in enumerate(losses)]


USUAL = [(-0.1 if step % 4 < 2 else 0.1) for step in range(20)]


def test_a_spike_is_several_steps_in_a_row_far_above_what_their_turn_usually_has() -> None:
    assert spikes([*USUAL, 3.0, 4.0, 5.0]) == [None] * 22 + [20]


def test_one_high_loss_or_two_is_no_spike_and_neither_is_what_is_usual_for_another_turn() -> None:
    assert not any(spikes([*USUAL, 3.0, 4.0, 0.0, 5.0, 6.0, 0.0]))
    assert not any(spikes([*USUAL, *USUAL]))


def test_losses_are_not_judged_by_a_few_and_all_begins_anew_after_a_spike() -> None:
    assert not any(spikes([*USUAL[:8], 3.0, 4.0, 5.0]))
    again = spikes([*USUAL, *[9.0] * 40])
    assert again.count(20) == 1 and len([step for step in again if step is not None]) == 1


def test_falling_losses_are_no_spike_and_by_default_nothing_is() -> None:
    assert not any(spikes([-step / 10 for step in range(60)]))
    assert not any(spikes([*USUAL, 1e9, 1e9, 1e9], spike_factor=0.0))


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"spike_factor = -1 must not be negative"):
        FaultConfig(spike_factor=-1)
    with pytest.raises(ConfigError, match=r"watchdog_s = 0 must be more than 0"):
        FaultConfig(watchdog_s=0)


@pytest.fixture
def samples(tmp_path_factory: pytest.TempPathFactory) -> TrainingSamples:
    run = replace(tiny_run(), faults=FaultConfig(max_bad_steps=3))
    return TrainingSamples(tiny_store(tmp_path_factory.getbasetemp()), run, model_config(run))


def windows(*bad: int) -> torch.Tensor:
    """Nats and values (2, 4, 4) of a step's four windows; traces and events are never asked for."""
    nats, values = torch.ones(4, 4), torch.tensor([[10.0, 0.0, 5.0, 0.0]] * 4)
    nats[list(bad), 2] = torch.inf
    return torch.stack([nats, values])


@pytest.mark.usefixtures("alone")
def test_after_so_many_skipped_steps_in_a_row_the_run_ends(samples: TrainingSamples, tmp_path: Path) -> None:
    incidents = Incidents(tmp_path, samples)
    for step, moved in enumerate([False, False, True, False, False]):
        incidents.judge(step, moved, float("nan"), windows())
    with pytest.raises(TrainingError) as error:
        incidents.judge(5, False, float("nan"), windows())
    assert str(error.value).startswith(
        "3 steps in a row, up to step 5, had a loss or a gradient that is not finite. Their"
    )
    assert f"{tmp_path / 'incidents.jsonl'}. Look at these recordings" in str(error.value)


@pytest.mark.usefixtures("alone")
def test_a_skipped_step_is_written_down_with_its_windows_and_losses(samples: TrainingSamples, tmp_path: Path) -> None:
    Incidents(tmp_path, samples).judge(6, False, float("inf"), windows(1, 3))
    row = json.loads((tmp_path / "incidents.jsonl").read_text())
    assert (row["step"], row["loss"], [window["position"] for window in row["windows"]]) == (6, None, [25, 27])
    first = row["windows"][0]
    assert (first["session"], first["start_s"]) == samples.window_at(25)
    assert first["nats"] == {"spikes": pytest.approx(0.1), "behavior": None}
    assert first["session"].startswith("d1/") and 12_000_000 <= first["start_s"] < 12_000_011


@pytest.mark.usefixtures("alone")
def test_a_spike_without_a_checkpoint_before_it_is_written_down_as_well(
    samples: TrainingSamples, tmp_path: Path
) -> None:
    Incidents(tmp_path, samples).rewound(9, 7, None)
    row = json.loads((tmp_path / "incidents.jsonl").read_text())
    assert (row["what"], row["positions"], row["back_to_step"]) == ("spike", [28, 40], None)


def test_the_window_at_a_position_is_the_one_that_is_read_there(samples: TrainingSamples) -> None:
    seen = []
    reader = samples._open()
    read = reader.read
    reader.read = lambda session, start_ns, *more: seen.append((session, start_ns)) or read(session, start_ns, *more)
    for position in range(12):
        samples[position]
    entries = reader.store.entries
    named = [(f"d1/{entries[session]['session_id']}", start_ns / 1e9) for session, start_ns in seen]
    assert named == [samples.window_at(position) for position in range(12)]
