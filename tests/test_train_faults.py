"""Faults of a run on real ranks: hangs, deaths, losses that are not finite, spikes, ranks that see different things.

In: ranks that do something bad to themselves at a step. Out: exit codes, incidents, checkpoints compared byte by byte.
"""

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from store_builders import target, write_plan
from train_builders import (
    LAUNCHER,
    losses,
    prepare_run,
    rank_environment,
    tiny_run,
    tiny_session,
    tiny_store,
    train_ranks,
    with_small_threshold,
)

from prep import catalog
from train import checkpoint
from train.build import model_config
from train.config import FaultConfig, RunConfig
from train.dataset import collate
from train.exit_codes import HUNG
from train.loader import TrainingSamples

# What a rank does to itself: `bad(rank, step, output)` is called in the middle of each forward.
BADLY = """
import os, signal, sys, time
from pathlib import Path
import torch
from train import loop
from train.engine import Engine
from train.heartbeat import Heart
out, rank, step = Path(sys.argv[2]), int(os.environ["RANK"]), 0
begin, forward = Heart.begin, Engine.forward
def begin_at(heart, number):
    global step
    step = number
    begin(heart, number)
def forward_badly(engine, batch, context_s):
    output = forward(engine, batch, context_s)
    bad(rank, step, output)
    return output
Heart.begin, Engine.forward = begin_at, forward_badly
"""
START = """
from train.__main__ import main
sys.exit(main(["worker", "--out", sys.argv[2], *sys.argv[3:]]))
"""

KILLS = """
def bad(rank, step, output):
    if step == 3 and rank == 1:
        (out / "killed").touch()
        os.kill(os.getpid() if os.environ["BRAINLOOM_KILL"] == "rank" else os.getppid(), signal.SIGKILL)
"""

STOPS = """
def bad(rank, step, output):
    if step == 3 and rank == 1:
        (out / "killed").touch()
        os.kill(os.getpid(), signal.SIGSTOP)
"""

# Step 2: the loss of rank 1 is infinite because of its second window, its gradient is not. Steps 0 and 4: the loss of
# rank 0 is fine, its gradient is infinite.
NOT_FINITE = """
def bad(rank, step, output):
    if (step, rank) == (2, 1):
        output.nats[1, 0] = torch.nan
        output.loss = output.loss + torch.inf
    if (step, rank) in ((0, 0), (4, 0)):
        output.loss.register_hook(lambda gradient: gradient * torch.inf)
"""

# Steps 6 to 8 are taken for a spike.
SPIKE = """
from train.loss_watch import LossWatch
LossWatch.spike = lambda self, step, turn, loss: 6 if step == 8 else None
def bad(rank, step, output):
    pass
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return with_small_threshold(tiny_run(num_steps=6, average_steps=6), tmp_path_factory.mktemp("ds"))


def worker(what: str, out: Path) -> list[str]:
    """The command of ranks that do something bad."""
    return [sys.executable, "-c", BADLY + what + START, "worker", str(out)]


def processes_of(out: Path) -> list[str]:
    """The processes, loader workers among them, of a launch whose environment had BRAINLOOM_RUN=out."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"BRAINLOOM_RUN={out}".encode() in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_text().replace("\0", " ")[:200])
        except OSError:
            continue  # it has ended, or is a zombie
    return found


def incidents(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "incidents.jsonl").read_text().splitlines()]


def digests(out: Path, step: int) -> dict[str, Any]:
    """Digests of all that is trained, in a checkpoint: weights and moments of each rank, rows of units."""
    opened = checkpoint.open_checkpoint(out / "checkpoints" / f"step-{step:08d}")
    files = opened.manifest["files"].items()
    rows, keys = opened.table()
    order = sorted(range(len(keys)), key=keys.__getitem__)
    table = hashlib.sha256(b"".join(rows[name][order].numpy().tobytes() for name in sorted(rows)))
    return {name: file["sha256"] for name, file in files if name.startswith("rank-")} | {"units": table.hexdigest()}


@pytest.mark.parametrize("whom", ["rank", "launcher"])
@pytest.mark.slow
def test_within_10_s_of_a_kill_9_in_the_middle_of_a_step_nobody_is_left(
    store: Path, run: RunConfig, tmp_path: Path, whom: str
) -> None:
    with_loader = replace(run, data=replace(run.data, num_workers=1))
    out = prepare_run(tmp_path / "killed", store, with_loader)
    env = {**rank_environment(), "BRAINLOOM_KILL": whom, "BRAINLOOM_RUN": str(out)}
    command = [sys.executable, "-c", LAUNCHER, str(out), *worker(KILLS, out)]
    with open(tmp_path / "said", "w") as said, subprocess.Popen(command, env=env, stdout=said, stderr=said) as launcher:
        most = 0
        while not (out / "killed").exists():
            assert launcher.poll() is None, (tmp_path / "said").read_text()
            most = max(most, len(processes_of(out)))
            time.sleep(0.01)
        killed_s = time.monotonic()
        assert most >= 5, "the launcher, two ranks and their loaders"
        code = launcher.wait()
        while left := processes_of(out):
            assert time.monotonic() - killed_s < 10, left
            time.sleep(0.1)
    assert code == (128 + signal.SIGKILL if whom == "rank" else -signal.SIGKILL)
    text = (tmp_path / "said").read_text()
    if whom == "rank":
        assert "rank 1 of 2 failed first and the others were stopped: signal SIGKILL" in text
        port = re.search(r"port (\d+),", text)
        assert port is not None and not list(Path("/dev/shm").glob(f"*_127.0.0.1_{port[1]}_*"))


@pytest.mark.slow
def test_a_rank_that_is_stopped_ends_the_run_within_seconds(
    store: Path, run: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = prepare_run(tmp_path / "hung", store, replace(run, faults=FaultConfig(watchdog_s=600.0)))
    monkeypatch.setenv("BRAINLOOM_RUN", str(out))
    assert train_ranks(out, command=worker(STOPS, out)) == HUNG
    assert time.time() - (out / "killed").stat().st_mtime < 15
    said = capfd.readouterr().err
    late = [line for line in said.splitlines() if "is late" in line]
    assert len(late) == 1 and "rank 1 is late: it has not moved for " in late[0]
    assert (
        " s, in forward of step 3, and its process is stopped (state T)" in late[0]
        and "in bad\n" in said
        and "in forward_badly\n" in said
    )
    left = [command for command in processes_of(out) if "pytest" not in command]
    assert not left


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_step_whose_loss_or_gradient_is_not_finite_on_one_rank_moves_nothing_on_any(
    store: Path, run: RunConfig, tmp_path: Path, precision: Any
) -> None:
    bad = replace(run, train=replace(run.train, precision=precision), checkpoint_every=1, keep_checkpoints=9)
    out = prepare_run(tmp_path / "bad", store, bad)
    assert train_ranks(out, command=worker(NOT_FINITE, out)) == 0
    after = [digests(out, step) for step in range(1, 7)]
    assert set(after[0]) >= {"rank-00000.safetensors", "rank-00001.safetensors"}
    assert after[1] == after[2] and after[3] == after[4], "weights, moments, averages, rows of the unit table"
    for first, second in ((0, 1), (2, 3), (4, 5)):
        assert all(after[first][name] != after[second][name] for name in after[first])
    samples = TrainingSamples(store, bad, model_config(bad))
    first_step, loss, gradient = incidents(out)
    assert (first_step["step"], first_step["what"]) == (0, "skipped")
    assert (loss["step"], loss["what"], loss["loss"]) == (2, "skipped", None)
    session, start_s = samples.window_at(11)
    assert [(w["position"], w["session"], w["start_s"]) for w in loss["windows"]] == [(11, session, start_s)]
    assert None in loss["windows"][0]["nats"].values()
    assert gradient["step"] == 4 and gradient["loss"] == losses(out)[4]
    assert [window["position"] for window in gradient["windows"]] == [16, 17, 18, 19]
    assert 'incident: {"step": 2, "what": "skipped"' in (out / "logs" / "rank-00000.log").read_text()


@pytest.mark.slow
def test_a_spike_is_undone_and_the_run_goes_on_behind_it(store: Path, run: RunConfig, tmp_path: Path) -> None:
    longer = replace(run, train=replace(run.train, num_steps=10), checkpoint_every=4, keep_checkpoints=9)
    out = prepare_run(tmp_path / "spike", store, longer)
    assert train_ranks(out, command=worker(SPIKE, out)) == 0
    folders = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert folders == [f"step-{step:08d}" for step in (4, 8, 9, 10)]
    assert digests(out, 9) == digests(out, 4) != digests(out, 8)
    opened = checkpoint.open_checkpoint(out / "checkpoints" / "step-00000009")
    assert opened.state()["position"] == 9 * run.train.global_batch_size
    (row,) = incidents(out)
    assert (row["what"], row["begun"], row["step"], row["back_to_step"]) == ("spike", 6, 8, 4)
    assert row["positions"] == [24, 36]
    resumed = shutil.copytree(out, tmp_path / "resumed", ignore=shutil.ignore_patterns("tensorboard", "step-00000010"))
    assert train_ranks(resumed, "--resume", "must") == 0
    assert losses(resumed) == losses(out) and digests(resumed, 10) == digests(out, 10)


@pytest.mark.slow
def test_ranks_that_see_different_modalities_have_the_loss_of_one_process(tmp_path: Path) -> None:
    root = tmp_path / "store"
    recording = tmp_path / "recording.txt"
    recording.write_text("stands for an NWB file")
    spikes = tiny_session(recording, "blind", 0)
    traces = tiny_session(recording, "imaging", 1)
    for plan in (spikes, replace(traces, streams=traces.streams[:1], stimuli=())):
        write_plan(plan, target(root, plan))
    catalog.write(root)
    run = with_small_threshold(tiny_run(num_steps=8, global_batch_size=2, micro_batch_size=1), tmp_path)
    samples = TrainingSamples(root, run, model_config(run))
    seen = set()
    for step in range(8):
        ranks = [collate([samples[2 * step + rank]])["source_modality"] for rank in range(2)]
        seen.add(tuple(tuple(modality.unique().tolist()) for modality in ranks))
    assert {((0, 2, 5), (0, 1, 5)), ((0, 1, 5), (0, 2, 5))} <= seen, seen  # 5: the session and the subject
    two, one = prepare_run(tmp_path / "two", root, run), prepare_run(tmp_path / "one", root, run)
    assert train_ranks(two) == 0 and train_ranks(one, slots=1) == 0
    assert max(abs(a - b) for a, b in zip(losses(two), losses(one), strict=True)) < 1e-5
    assert len({round(loss, 4) for loss in losses(one)}) > 4
