"""The fault campaign's own bookkeeping; the slow test kills ingest ten times and expects the same bytes every time.

In: rows made up, or real runs of `python -m prep ingest`. Out: tables in temporary folders.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import campaign
import pytest
from campaign import FAULTS, Row, Truth
from campaign_table import rows_of

ROW = Row(
    number=0, fault="client", at_s=1.5, limit_mb=0.0, first_code=-9, first_s=2.0, met="shards", sealed=1, error="",
    rerun_code=0, rerun_s=3.0,
    same_bytes=True, verified=True, nothing_outside=True, nobody_left=True, said="",
)  # fmt: skip


def test_a_campaign_goes_on_where_the_last_one_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "recordings", lambda folder, is_large: folder)
    monkeypatch.setattr(campaign, "undisturbed", lambda work: Truth(files={}, code=0, seconds=1.0, num_bytes=1))
    monkeypatch.setattr(campaign, "one_run", lambda number, work, truth: replace(ROW, number=number))
    table = tmp_path / "bench" / "CAMPAIGN.jsonl"
    assert [row.number for row in campaign.campaign(3, table, tmp_path)] == [0, 1, 2]
    assert [row.number for row in campaign.campaign(2, table, tmp_path)] == [3, 4]
    assert [row.number for row in rows_of(Row, table)] == [0, 1, 2, 3, 4]
    assert "5 of 5 runs ended with the same bytes" in table.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    "wrong",
    [
        {"first_code": None}, {"rerun_code": None}, {"same_bytes": False}, {"verified": False},
        {"nothing_outside": False}, {"nobody_left": False},
    ],
)  # fmt: skip
def test_a_run_that_is_not_sound_is_named(wrong: dict[str, None]) -> None:
    shown = campaign.summary([ROW, replace(ROW, number=1, fault="disk", said="no space left", **wrong)])
    assert "1 of 2 runs ended with the same bytes" in shown
    assert "* not sound: run 1 (disk at 1.5 s): no space left" in shown


def test_the_first_ten_runs_have_every_fault() -> None:
    assert set(FAULTS) == {"client", "worker", "scheduler", "their worker", "their client", "disk", "memory"}
    assert len(FAULTS) == 10


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk: needs root on Linux")
def test_ten_runs_that_were_killed_or_starved_end_with_the_same_bytes(tmp_path: Path) -> None:
    rows = campaign.campaign(10, tmp_path / "CAMPAIGN.jsonl", tmp_path / "work", is_large=False)
    assert [row for row in rows if not row.is_sound] == []
