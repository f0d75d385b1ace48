"""The fault campaign of training: its own bookkeeping; the slow test disturbs ten runs.

In: rows made up, or real runs of two ranks. Out: tables in temporary folders.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import campaign_train
import pytest
from campaign_train import FAULTS, MOMENTS, Fault, Row, Truth

ROW = Row(
    number=0, fault="kill one", moment="writing", victim=1, first_code=137, first_s=9.0, error="", damaged="", sealed=4,
    resumed=4, passed_over=0, rerun_code=0, rerun_s=8.0, same_losses=True, same_state=True, nobody_left=True, said="",
)  # fmt: skip


def test_a_campaign_goes_on_where_the_last_one_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign_train, "undisturbed", lambda work: Truth([], {}, 1.0, 1))
    monkeypatch.setattr(campaign_train, "one_run", lambda number, work, truth: replace(ROW, number=number))
    table = tmp_path / "bench" / "CAMPAIGN.jsonl"
    assert [row.number for row in campaign_train.campaign(3, table, tmp_path)] == [0, 1, 2]
    assert [row.number for row in campaign_train.campaign(2, table, tmp_path)] == [3, 4]
    assert "5 of 5 runs went on from the newest checkpoint" in table.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    "wrong",
    [
        {"first_code": None}, {"rerun_code": 1}, {"resumed": 2}, {"same_losses": False}, {"same_state": False},
        {"nobody_left": False}, {"fault": "disk", "error": "Bus error"},
    ],
)  # fmt: skip
def test_a_run_that_is_not_sound_is_named(wrong: dict[str, None]) -> None:
    shown = campaign_train.summary([ROW, replace(ROW, number=1, said="it is late", **wrong)])
    assert "1 of 2 runs went on" in shown and "* not sound: run 1 " in shown and "it is late" in shown


def test_a_hundred_runs_have_every_fault_at_every_moment_and_on_both_ranks() -> None:
    faults = [Fault.of(number, 3.0) for number in range(100)]
    assert {(fault.kind, fault.moment) for fault in faults} == {(kind, at) for kind in FAULTS for at in MOMENTS}
    assert {fault.victim for fault in faults} == {0, 1} and {fault.count for fault in faults} >= {1, 2, 3, 4, 5, 6}
    assert sum(fault.moment not in ("stepping", "random") for fault in faults) > 50, "many are inside of a save"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk: needs root on Linux")
def test_runs_that_were_killed_starved_or_damaged_end_as_if_nothing_had_been(tmp_path: Path) -> None:
    rows = campaign_train.campaign(10, tmp_path / "CAMPAIGN.jsonl", tmp_path / "work")
    assert [row for row in rows if not row.is_sound] == []
