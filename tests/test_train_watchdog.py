"""Hearts and the watchdog: who is late is named, with phase and stack, and the launch ends.

In: small Python scripts with a heart, as ranks of a real launcher; beats written by hand. Out: exit codes, messages.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train import watchdog
from train.events import Pulse
from train.exit_codes import HUNG
from train.heartbeat import Beat, Heart, beat_path, read_beat
from train.hostfile import Host
from train.launch import launch
from train.watchdog import Seen, Watchdog, explain

ROOT = Path(__file__).resolve().parent.parent

# Ranks of step 7, of which the script that follows says what rank 1 does, and what rank 0.
RANKS = """
import os, signal, sys, time
from pathlib import Path
from train.heartbeat import Heart
heart = Heart(Path(sys.argv[1]), int(os.environ["RANK"]), patience_s=2)
print("process", os.getpid(), flush=True)
heart.begin(7)
def waits_in(path):
    exec(compile("import time\\ndef wait():\\n    time.sleep(600)\\nwait()", path, "exec"))
"""


def run_ranks(tmp_path: Path, script: str) -> int:
    """Two ranks by the launcher."""
    logs = tmp_path / "logs"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    return launch([Host("localhost", 2)], [sys.executable, "-c", RANKS + script, str(logs)], logs, env)


def alive(tmp_path: Path) -> list[str]:
    """The processes of `run_ranks` that are still there."""
    lines = [line for log in (tmp_path / "logs").glob("*.log") for line in log.read_text().splitlines()]
    pids = [line.split()[1] for line in lines if line.startswith("process ")]
    assert len(pids) == 2
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_rank_that_is_stopped_is_named_with_its_stack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = """
heart.enter("forward")
def where_it_stops():
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)
if os.environ["RANK"] == "1":
    where_it_stops()
time.sleep(600)
"""
    began_s = time.monotonic()
    assert run_ranks(tmp_path, script) == HUNG
    assert time.monotonic() - began_s < 30
    said = capsys.readouterr().err
    late = [line for line in said.splitlines() if "is late" in line]
    assert len(late) == 1 and late[0].startswith("launch: watchdog: rank 1 is late: forward of step 7 lasts "), said
    assert "longer than 2 s, and its process is stopped (state T) (process " in late[0]
    assert f"It stands here ({tmp_path / 'logs' / 'rank-00001.log'}):\n  | File" in said and "in where_it_stops" in said
    assert not alive(tmp_path)


def test_a_rank_that_is_behind_is_named_and_not_those_that_wait_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = 'if os.environ["RANK"] == "0":\n    heart.enter("forward")\ntime.sleep(600)'
    assert run_ranks(tmp_path, script) == HUNG
    late = [line for line in capsys.readouterr().err.splitlines() if "is late" in line]
    assert len(late) == 1 and "rank 1 is late: data_wait of step 7 lasts longer than 2 s (process " in late[0]
    assert not alive(tmp_path)


def test_of_ranks_in_one_phase_the_one_that_waits_for_no_other_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = """
heart.enter("backward")
waits_in("/x/torch/distributed/distributed_c10d.py" if os.environ["RANK"] == "0" else "/x/train/model/endless.py")
"""
    assert run_ranks(tmp_path, script) == HUNG
    said = capsys.readouterr().err
    assert "rank 1 is late: backward of step 7" in said and "endless.py" in said and "rank 0 is late" not in said


def test_ranks_that_move_are_not_late_and_leave_no_beats(tmp_path: Path) -> None:
    script = """
for step in range(8):
    heart.begin(step)
    time.sleep(0.5)
heart.stop()
"""
    assert run_ranks(tmp_path, script) == 0
    assert not list((tmp_path / "logs").glob("*.beat"))


def test_without_a_launcher_a_rank_that_hangs_writes_its_stacks_and_ends_itself(tmp_path: Path) -> None:
    script = RANKS.replace("heart =", "from train import heartbeat; heartbeat.GRACE_S = 1.0\nheart =")
    script += "def where_it_hangs():\n    time.sleep(600)\nwhere_it_hangs()"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "3"}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == HUNG
    assert "rank 3: data_wait of step 7 does not end" in done.stderr and "in where_it_hangs" in done.stderr


def a_beat(rank: int, num_pulses: int, num_phases: int, host: str = "n1") -> Beat:
    return Beat(
        rank=rank,
        host=host,
        pid=4242,
        step=5,
        phase="forward",
        num_phases=num_phases,
        num_pulses=num_pulses,
        patience_s=20.0,
    )


def look(monkeypatch: pytest.MonkeyPatch, beats_at: list[list[Beat]], stopped: tuple[int, ...] = ()) -> list[list[int]]:
    """What a watchdog says, second after second, of the beats that it hears."""
    now_s = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now_s[0])
    dog, said = Watchdog(), []
    for beats in beats_at:
        dog.hear("n1", Pulse(beats, list(stopped)))
        now_s[0] += 1.0
        said.append(dog.late())
    return said


def test_late_is_who_has_no_pulse_then_who_is_behind_then_all(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = range(30)
    silent = [[a_beat(0, n, 9), a_beat(1, min(n, 3), 9)] for n in seconds]
    behind = [[a_beat(0, n, 9), a_beat(1, n, 8)] for n in seconds]
    together = [[a_beat(0, n, 9), a_beat(1, n, 9)] for n in seconds]
    moving = [[a_beat(0, n, n // 15), a_beat(1, n, n // 15)] for n in seconds]
    for beats, late in ((silent, [1]), (behind, [1]), (together, [0, 1]), (moving, [])):
        said = look(monkeypatch, beats)
        assert said == [[]] * 21 + [late] * 9 if late else said == [[]] * 30


def test_who_was_stopped_by_a_signal_is_late_as_soon_as_its_pulse_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    beats = [[a_beat(0, n, 9), a_beat(1, min(n, 3), 9)] for n in range(12)]
    assert look(monkeypatch, beats, stopped=(1,)) == [[]] * 9 + [[1]] * 3
    going_on = [[a_beat(0, n, 9), a_beat(1, n, 9)] for n in range(12)]
    assert look(monkeypatch, going_on, stopped=(1,)) == [[]] * 12, "stopped for a moment"


def test_what_is_no_beat_and_a_rank_that_has_ended_count_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beat_path(tmp_path, 1).write_text("{")
    assert read_beat(beat_path(tmp_path, 1)) is None
    assert look(monkeypatch, [[a_beat(1, 1, 1)], *([[]] * 30)]) == [[]] * 31


def test_a_launch_that_was_suspended_with_its_ranks_finds_nobody_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now_s[0])
    dog = Watchdog()
    dog.hear("n1", Pulse([a_beat(0, 1, 1)]))
    for wait_s in (1.0, 3600.0, 1.0):
        now_s[0] += wait_s
        assert dog.late() == []


def test_a_late_rank_of_another_host_is_named_without_a_stack_and_many_are_counted() -> None:
    named, said = explain([Seen(a_beat(rank, 1, 1, "far-away"), still_s=21) for rank in range(12)], {})
    assert named == [*range(12)]
    assert "rank 7 is late: forward of step 5 lasts longer than 20 s (process 4242 on far-away)." in said
    assert "rank 8" not in said and said.endswith("4 more ranks are late.")


def test_a_beat_is_rewritten_in_place_so_that_a_full_disk_stops_no_heart(tmp_path: Path) -> None:
    heart = Heart(tmp_path, 0, patience_s=60)
    path = beat_path(tmp_path, 0)
    before = path.stat()
    heart.begin(11)
    deadline = time.monotonic() + 10
    while read_beat(path).num_pulses < 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    after, beat = path.stat(), read_beat(path)
    assert beat is not None and (beat.step, beat.phase, beat.host) == (11, "data_wait", socket.gethostname())
    assert (before.st_ino, before.st_size) == (after.st_ino, after.st_size)
    heart.stop()
    assert not path.exists()
