"""The fault campaign of several hosts: its own bookkeeping; the slow test disturbs one run by each fault.

In: rows made up, or real runs over three hosts in namespaces. Out: tables in temporary folders.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import campaign_cluster
import pytest
from campaign_cluster import FAULTS, NAMES, Fault, Row
from hosts_on_one_machine import why_not

ROW = Row(
    number=0, fault="network cut", host="n2", step=7, named_s=9.1, said="n2 is lost", first_code=0, first_s=60.0,
    went_on=["n1 slots=1", "n3 slots=1"], from_step=4, incidents=1, rerun_code=None, rerun_s=0.0, error=1e-7,
    nobody_left=True, gone_s=0.1,
)  # fmt: skip
DISK = replace(ROW, fault="disk full", first_code=2, went_on=[], rerun_code=0)


def test_a_campaign_goes_on_where_the_last_one_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def no_hosts(folder: Path, names: Any) -> Iterator[None]:
        yield None

    monkeypatch.setattr(campaign_cluster, "hosts", no_hosts)
    monkeypatch.setattr(campaign_cluster, "undisturbed", lambda work: [])
    monkeypatch.setattr(campaign_cluster, "one_run", lambda number, made, work, truth: replace(ROW, number=number))
    table = tmp_path / "bench" / "CAMPAIGN.jsonl"
    assert [row.number for row in campaign_cluster.campaign(3, table, tmp_path)] == [0, 1, 2]
    assert [row.number for row in campaign_cluster.campaign(2, table, tmp_path)] == [3, 4]
    shown = table.with_suffix(".md").read_text()
    assert "5 of 5 runs were sound" in shown and "| network cut | 5 | 5 | 9.1 s | 0.1 s | 0 | 60 s | 0 s |" in shown


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        (ROW, {"named_s": None}), (ROW, {"named_s": 16.0}), (ROW, {"first_code": 1, "rerun_code": 0}),
        (ROW, {"first_code": None}), (ROW, {"went_on": []}), (ROW, {"error": -1.0}), (ROW, {"error": 1e-4}),
        (ROW, {"nobody_left": False}), (ROW, {"incidents": 0}), (DISK, {"first_code": 0}), (DISK, {"first_code": 1}),
        (DISK, {"rerun_code": 1}), (DISK, {"named_s": None}),
    ],
)  # fmt: skip
def test_a_run_that_is_not_sound_is_named(row: Row, wrong: dict[str, Any]) -> None:
    assert row.is_sound
    shown = campaign_cluster.summary([row, replace(row, number=1, said="it is late", **wrong)])
    assert "1 of 2 runs were sound" in shown and f"* not sound: run 1 ({row.fault} on n2): it is late" in shown


def test_what_shows_at_the_next_start_has_longer_and_a_dead_launcher_names_nobody() -> None:
    assert replace(ROW, fault="stale lock", named_s=40.0).is_sound
    assert replace(DISK, fault="launcher killed", first_code=-9, named_s=None).is_sound


def test_a_hundred_runs_have_every_fault_on_every_host_while_it_starts_and_while_it_trains() -> None:
    faults = [Fault.of(number) for number in range(100)]
    assert {(fault.kind, fault.host) for fault in faults} == {(kind, host) for kind in FAULTS for host in NAMES}
    assert 5 < sum(fault.step < 0 for fault in faults) < 40
    assert {fault.step for fault in faults} >= {-1, 0, 5, 19}


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_a_run_over_three_hosts_survives_each_fault_of_one_of_them(tmp_path: Path) -> None:
    rows = campaign_cluster.campaign(len(FAULTS), tmp_path / "CAMPAIGN.jsonl", tmp_path / "work")
    assert [row for row in rows if not row.is_sound] == []
