"""Tasks on workers that die, hang and come back: who is blamed, what is tried again, and that nobody waits for ever.

In: functions that sleep, loop or kill their process; stand-ins for recordings. Out: results, and stores in temporary
folders.
"""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client
from store_builders import FOR_EVER_S, FakeRecipe, fake_planner, tree

import prep.cluster
from prep.__main__ import main
from prep.cluster import connect
from prep.files import find_files
from prep.flow import Flow, Task
from prep.ingest import run_ingest
from prep.plan import PrepError
from prep.tasks import Failed
from prep.verify import verify

PATIENCE_S = 2.0
REMEDY = "Is the disk or the server that holds the file there? Copy it elsewhere, or give more --patience."


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with connect(None, 2) as connected:
        yield connected


def results(client: Client, *calls: tuple[Any, ...], patience_s: float = 60.0) -> list[Any]:
    """What becomes of calls (function, *args) that are handed out together."""
    flow, found = Flow(lambda: client, patience_s), [None] * len(calls)
    for number, (function, *args) in enumerate(calls):

        def keep(result: Any, number: int = number) -> None:
            found[number] = result

        flow.urgent.append(Task(f"call {number}", keep, function, tuple(args)))
    flow.run(lambda: None)
    return found


def spin() -> None:
    """A decoder in a loop without end."""
    while True:
        sum(range(1000))


def die(marks: Path, num_times: int) -> str:
    """Kill the worker, but not for ever."""
    marks.mkdir(exist_ok=True)
    if len(list(marks.iterdir())) < num_times:
        (marks / str(time.monotonic_ns())).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def rest(seconds: float) -> str:
    time.sleep(seconds)
    return "rested"


def test_a_recording_that_hangs_fails_alone_with_one_line(client: Client, tmp_path: Path) -> None:
    folder, store = tmp_path / "in", tmp_path / "store"
    folder.mkdir()
    texts = {"a": "session=s1", "b": "session=s2 hangs=1", "c": f"session=s3 slow_s={FOR_EVER_S}", "d": "session=s4"}
    for name, text in texts.items():
        (folder / f"{name}.nwb").write_text(text)
    files, started = find_files([folder], "d1", store), time.monotonic()
    outcomes = run_ingest(files, store, FakeRecipe(), lambda: client, planner=fake_planner, patience_s=PATIENCE_S)
    assert [row.state for row in outcomes] == ["ok", "refused", "failed", "ok"]
    assert time.monotonic() - started < 60
    assert outcomes[1].object == "" and outcomes[2].object.startswith("streams/spikes (/units), shard ")
    for row in outcomes[1:3]:
        assert row.reason == f"it hung: nothing happened for 2 s, and its worker was ended. {REMEDY}"
    assert [problem for row in verify(store) for problem in row.problems] == []
    (folder / "b.nwb").write_text("session=s2")
    (folder / "c.nwb").write_text("session=s3")
    again = run_ingest(files, store, FakeRecipe(), lambda: client, planner=fake_planner)
    assert [row.state for row in again] == ["already there", "ok", "ok", "already there"]
    run_ingest(files, tmp_path / "fresh", FakeRecipe(), lambda: client, planner=fake_planner)
    assert tree(store) == tree(tmp_path / "fresh")


def test_a_loop_without_end_is_ended_and_what_works_on_is_not(client: Client) -> None:
    patience_s = 0.4
    looped, rested = results(client, (spin,), (rest, 0.2), patience_s=patience_s)
    assert isinstance(looped, Failed) and rested == "rested"
    assert looped.error == f"it came to no end in 5 s, and its worker was ended. {REMEDY}"


def test_whoever_is_beside_a_task_that_kills_its_workers_is_not_blamed(client: Client, tmp_path: Path) -> None:
    calls = [(die, tmp_path / "a", 99), *[(rest, 0.5)] * 8]
    died, *others = results(client, *calls)
    assert died == Failed("call 0", "worker processes died of it, perhaps for want of memory; try fewer --workers.")
    assert others == ["rested"] * 8
    assert len(list((tmp_path / "a").iterdir())) == 3


def test_a_worker_that_dies_once_costs_nothing_but_time(client: Client, tmp_path: Path) -> None:
    assert results(client, (die, tmp_path / "a", 1), (rest, 0.1)) == ["alive", "rested"]


class Last:
    """A result that kills its worker when it is asked for, the first time."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        if not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return str, ("fetched",)


def test_a_result_that_dies_with_its_worker_before_it_is_fetched_is_made_again_soon(
    client: Client, tmp_path: Path
) -> None:
    started = time.monotonic()
    assert results(client, (Last, tmp_path / "died"), (rest, 0.1)) == ["fetched", "rested"]
    assert (tmp_path / "died").exists()
    assert time.monotonic() - started < 15


@pytest.mark.slow
def test_workers_come_back_however_often_they_die(tmp_path: Path) -> None:
    with connect(None, 1) as alone:  # Dask closes for good whom it does not see 15 s after a death
        for number in range(3):
            assert isinstance(results(alone, (die, tmp_path / str(number), 99))[0], Failed)
        assert results(alone, (rest, 15.0), (rest, 0.1)) == ["rested", "rested"]


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["heard", "ignored"])
def interrupts(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ctrl-C as a terminal has it, and as a script's background has it."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_workers_that_cannot_be_started_again_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prep.cluster, "GONE_S", 1.0)
    with pytest.raises(PrepError, match=r"no worker for 1 s: the worker processes end, and cannot be started again"):
        with connect(None, 1) as alone:
            alone.cluster.scale(0)
            results(alone, (rest, 0.1))


def test_workers_that_do_not_start_end_the_run_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(**_: Any) -> None:
        raise RuntimeError("Nanny failed to start.")

    monkeypatch.setattr(prep.cluster, "LocalCluster", fails)
    (tmp_path / "a.nwb").write_text("session=s1")
    assert main(["ingest", str(tmp_path / "a.nwb"), "--out", str(tmp_path / "store")]) == 1
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith(
            "the worker processes do not start (Nanny failed to start.). Is there memory left on this machine? "
            "What is sealed stays. Run the same command again to go on."
        )
    )


def test_patience_is_a_number_of_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ingest", "/nope", "--out", "x", "--patience", "0"]) == 2
    assert "--patience 0: expected minutes, more than 0." in capsys.readouterr().err
