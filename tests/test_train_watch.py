"""A run seen in a terminal, while it goes on.

In: run folders made by hand, rows that come while one looks. Out: lines of text.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from run_builders import HOSTILE, step_row, write_incidents, write_steps
from train_builders import handmade_run, prepare_run, tiny_run, tiny_store

from train import watch
from train.__main__ import main
from train.run_folder import Growing, RunFolder, counted, duration, phase_shares, short, size

RUN = replace(tiny_run(num_steps=20), validate_every=5)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.getbasetemp())


def seen(run_dir: Path) -> str:
    """The page as text."""
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115  closed with the console
    with console.file:
        console.print(watch.page(RunFolder(run_dir), time.time()))
    return console.export_text()


def test_a_page_shows_how_far_how_well_and_how_fast(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "half [bold]way"
    handmade_run(out, store, RUN)
    write_steps(out, RUN, 10, mfu=0.45)
    write_incidents(out)
    page = seen(out)
    assert "half [bold]way · debug · 2 ranks" in page, "a name is no markup"
    assert "step 10 / 20" in page and "50%" in page and "20 s left · last step" in page
    assert "communication 6.2%" in page and "other 3.1%" in page
    for number in ("1,004 tokens/s", "MFU 45.0%", "5.0 unit-hours seen", "0.65 GiB"):
        assert number in page
    assert "spikes encoding from behavior + stimulus" in page and f"{0.5 - 1 / 11:.3f}" in page
    assert "checkpoint: step 1," in page
    assert "step 3, skipped: loss None, 2 windows" in page and f"message {HOSTILE}" in page


def test_a_run_that_has_not_begun_is_waited_for(store: Path, tmp_path: Path) -> None:
    page = seen(prepare_run(tmp_path / "new", store, RUN))
    assert "waiting for the first step" in page and "no checkpoint yet" in page


def test_a_rank_that_is_behind_is_named(store: Path, tmp_path: Path) -> None:
    out = prepare_run(tmp_path / "uneven", store, RUN)
    (out / "logs").mkdir()
    for rank, (phase, num_phases) in enumerate((("backward", 9), ("backward", 9), ("data_wait", 7))):
        beat = {"rank": rank, "host": "node-1", "phase": phase, "num_phases": num_phases}
        (out / "logs" / f"rank-{rank:05d}.beat").write_text(json.dumps(beat).ljust(512))
    (out / "logs" / "rank-00003.beat").write_text('{"rank": 3, ')
    assert "ranks: 2 in backward, 1 in data_wait; rank 2 on node-1 is 2 phases behind; heard 0 s ago" in seen(out)


def test_where_no_terminal_is_it_prints_once(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = prepare_run(tmp_path / "plain", store, RUN)
    write_steps(out, RUN, 3)
    assert main(["watch", str(out)]) == 0
    assert capsys.readouterr().out.count("step 3 / 20") == 1


def test_it_looks_until_the_last_checkpoint_is_sealed(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out, waits = tiny_run(num_steps=1), tmp_path / "short", []
    prepare_run(out, store, run)

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            write_steps(out, run, 1)
            handmade_run(tmp_path / "other", store, run)
            (tmp_path / "other" / "checkpoints").rename(out / "checkpoints")

    monkeypatch.setattr(watch.time, "sleep", sleep)
    monkeypatch.setattr(watch, "Console", lambda: Console(force_terminal=True, width=100))
    assert main(["watch", str(out), "--every", "7"]) == 0
    assert waits == [7.0, 7.0] and "all steps are done" in capsys.readouterr().out


def test_ctrl_c_ends_the_look_and_no_traceback(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupt)
    monkeypatch.setattr(watch, "Console", lambda: Console(force_terminal=True, width=100))
    assert main(["watch", str(prepare_run(tmp_path / "run", store, RUN))]) == 0


def test_rows_are_read_as_they_come_and_anew_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    growing = Growing(path)
    assert growing.rows() == []
    path.write_text('{"step": 0}\n{"st')
    assert growing.rows() == [{"step": 0}]
    path.write_text('{"step": 0}\n{"step": 1}\n')
    assert growing.rows() == [{"step": 0}, {"step": 1}]
    (tmp_path / "kept").write_text('{"step": 5}\n{"step": 6}\n{"step": 7}\n')
    (tmp_path / "kept").rename(path)
    assert [row["step"] for row in growing.rows()] == [5, 6, 7]


def test_shares_of_the_time_are_those_of_the_phases() -> None:
    rows: list[dict[str, Any]] = [step_row(step, ("encoding",)) for step in range(4)]
    rows[0] |= {"seconds": 4.0}
    shares = phase_shares(rows)
    assert shares["forward"] == 4 * 0.5 / 10 and sum(shares.values()) == pytest.approx(1)
    on_a_gpu = [{name: value for name, value in row.items() if name != "communication_s"} for row in rows]
    assert "communication" not in phase_shares(on_a_gpu)


def test_a_curve_shows_the_course_whatever_its_outliers() -> None:
    assert watch.curve([float("nan")]) == ""
    assert watch.curve([1.0, 2.0, 3.0]) == "▁▄█"
    steady = watch.curve([*range(320), 1e9])
    assert len(steady) == watch.WIDTH and steady[0] == "▁" and steady[-2] in "▇█" and steady[15] in "▃▄▅"


def test_numbers_in_words() -> None:
    said = [duration(seconds) for seconds in (0.4, 59, 119, 120, 7199, 7200, 12_000, 200_000)]
    assert said == ["0 s", "59 s", "119 s", "2 min", "119 min", "2 h 0 min", "3 h 20 min", "2 d 7 h"]
    assert [size(number) for number in (12, 12_345, 29_500_000, 1.8e10)] == ["12 B", "12.3 kB", "29.5 MB", "18 GB"]
    assert [short(number) for number in (0, 999, 4096, 1_154_600_000)] == ["0", "999", "4.1 k", "1.15 G"]
    assert (counted(1, "rank"), counted(2000, "rank")) == ("1 rank", "2,000 ranks")
