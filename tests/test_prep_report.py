"""The report says what the store holds, shows it in a real browser without a network, and survives odd sessions.

In: hand-built stores of one to a hundred sessions, a headless Chromium. Out: nothing.
"""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from report_builders import (
    SCRIPT,
    Browser,
    bare,
    browser,
    build,
    chromium,
    content,
    events,
    many,
    nothing_but_nan,
    rich,
    svgs,
    titles,
)
from store_builders import Values, a_recording, session, stream

from prep import report, report_data
from prep.__main__ import main
from prep.plan import Finding, SessionPlan
from prep.report import render
from prep.report_data import Pool, finding_row, fold_columns, summarise, union_ns
from prep.report_plots import clean
from prep.store import Store

NEEDS_BROWSER = pytest.mark.skipif(chromium() is None and "CI" not in os.environ, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_recording(tmp_path_factory.mktemp("recording"))


@pytest.fixture(scope="module")
def hundred(tmp_path_factory: pytest.TempPathFactory, recording: Path) -> Path:
    return many(tmp_path_factory.mktemp("hundred") / "store", recording)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, recording: Path) -> Path:
    return build(tmp_path_factory.mktemp("single") / "store", rich(recording, "s1", 1))


# ---------------------------------------------------------------- in a browser


def count(page: Browser, selector: str) -> int:
    number: int = page.run(f"document.querySelectorAll({json.dumps(selector)}).length")
    return number


def search(page: Browser, words: str) -> None:
    page.run(
        f"document.getElementById('search').value = {json.dumps(words)};"
        "document.getElementById('search').dispatchEvent(new Event('input'))"
    )


@pytest.mark.slow
@NEEDS_BROWSER
def test_a_report_of_a_hundred_sessions_works_in_a_browser_without_network_or_complaint(
    hundred: Path, tmp_path: Path
) -> None:
    file = tmp_path / "report.html"
    assert main(["report", str(hundred), "--out", str(file)]) == 0
    assert file.stat().st_size < 12e6, "a picture is about 0.1 MB, and 24 sessions have three"
    with browser() as page:
        page.open(file)
        assert count(page, "tr.group") == 3
        assert count(page, "tr.session") == 30 + 10 + 50, "a dataset shows its first fifty"
        page.run("[...document.querySelectorAll('.more')].find(b => b.textContent.includes('vision')).click()")
        assert count(page, "tr.session") == 100
        assert count(page, "#datasets-table tbody tr") == 3

        search(page, "vision s0040")
        assert count(page, "tr.session") == 1
        assert page.run("document.getElementById('found').textContent") == "1 of 100 sessions"
        search(page, "nobody")
        assert count(page, "tr.session") == count(page, "tr.group") == 0
        search(page, "sleep")
        assert count(page, "tr.session") == 10

        page.run("document.querySelector('#sessions-table thead button').click()")
        first = "document.querySelector('tr.session .open').textContent.slice(0, 5)"
        upwards = page.run(first)
        page.run("document.querySelector('#sessions-table thead button').click()")
        assert [upwards, page.run(first)] == ["s0009", "s0099"]

        page.run("[...document.querySelectorAll('.open')].find(b => b.textContent.includes('◨')).click()")
        page.run("Promise.all([...document.images].map(image => image.decode()))")
        assert page.run("[...document.querySelectorAll('.detail img')].map(i => i.naturalWidth > 0)") == [True] * 3
        assert "clock-drift" in page.run("document.querySelector('.detail').textContent")
        assert count(page, ".detail .bar") == 1 + 7, "splits, then one for each stream"
        assert page.screenshot(tmp_path / "page.png").stat().st_size > 50_000
        page.run("document.querySelector('.open[aria-expanded=true]').click()")
        assert count(page, ".detail") == 0
        page.open(file, width=400, theme="dark")
        assert page.run("document.documentElement.scrollWidth") == 400, "only tables and pictures scroll sideways"
        assert page.complaints == []
        assert {re.split(r"[:;]", url)[0] for url in page.requests} <= {"file", "data", "about"}
        assert {url for url in page.requests if url.startswith("file")} == {file.resolve().as_uri()}


@NEEDS_BROWSER
def test_names_with_html_in_them_are_shown_as_they_are(tmp_path: Path, recording: Path) -> None:
    plan = rich(recording, SCRIPT, 1, SCRIPT)
    plan = replace(
        plan,
        subject_id=SCRIPT,
        licence="<b>free</b>",
        units=replace(plan.units, region=[SCRIPT] * 5, quality=['"><img src=x>'] * 5),
        streams=(*plan.streams[:-2], events("odd", (SCRIPT, "$x^$ & \x07"), np.arange(8.0))),
        findings=(Finding(code=SCRIPT, path=SCRIPT, action="refused", message=SCRIPT),),
    )
    page_text = render(Store(build(tmp_path / "store", plan)))
    assert "<script>document" not in page_text
    for svg in svgs(page_text):
        assert "<script" not in svg
    file = tmp_path / "report.html"
    file.write_text(page_text, encoding="utf-8")
    with browser() as page:
        page.open(file)
        page.run("document.querySelector('.open').click()")
        page.run("Promise.all([...document.images].map(image => image.decode()))")
        assert page.run("document.title") == "store · token store"
        assert page.run("document.querySelector('.open').textContent") == SCRIPT
        assert SCRIPT in page.run("document.querySelector('.detail').textContent")
        assert page.complaints == []


def test_in_continuous_integration_there_is_a_browser() -> None:
    assert chromium() is not None or "CI" not in os.environ, "install the package `chromium`: .ci/run does"


# ---------------------------------------------------------------- what it says


def test_totals_are_those_of_the_sessions(hundred: Path) -> None:
    summary = summarise(Store(hundred))
    expected_ns = 100 * (3 * 130 + 2 * 125) * 100_000_000
    assert summary.totals["sessions"] == 100
    assert summary.totals["subjects"] == 6 + 3 + 1, "ids are the datasets' own: two mouse-1 of two datasets are two"
    assert summary.totals["units"] == 500
    assert summary.totals["unit_hours"] == pytest.approx(expected_ns / 3600e9, rel=1e-12)
    assert summary.totals["hours"] == pytest.approx(100 * 13 / 3600, rel=1e-12)
    assert summary.totals["tokens"] == 100 * (130 * 3 + 125 * 2 + 125 + 60 + 9 + 33 + 8)
    assert summary.totals["modalities"] == ["spikes", "traces", "behavior", "stimulus"]
    assert summary.totals["licences"] == [("CC-BY-4.0", 100)]
    assert summary.totals["bytes"] == sum(entry["num_bytes"] for entry in Store(hundred).entries) + sum(
        entry["num_bytes"] for entry in Store(hundred).catalog["stimuli"].values()
    )
    assert [(row["dataset"], row["sessions"]) for row in summary.datasets] == [
        ("motor", 30),
        ("sleep", 10),
        ("vision", 60),
    ]


def test_hours_are_counted_once_where_streams_overlap() -> None:
    assert union_ns([(0, 10), (5, 12), (20, 30), (20, 25)]) == 22
    assert union_ns([(0, 10), (2, 3), (10, 11)]) == 11
    assert union_ns([]) == 0


def test_coverage_folds_the_columns_of_a_table(single: Path) -> None:
    data = content(render(Store(single)))
    rows = [data["coverage"][i] for i in data["sessions"][0]["coverage"]]
    assert rows == [
        ["general/devices/probe", "Device", "skipped", "device metadata"],
        ["units", "Units", "spikes", ""],
        ["units/*", "1 column", "spikes", ""],
        ["units/*", "2 columns", "skipped", "a column that is not read"],
    ]
    assert (data["sessions"][0]["num_used"], data["sessions"][0]["num_objects"]) == (2, 5)
    assert data["coverage_types"] == [["Device", "skipped", "device metadata", 1], ["Units", "used", "", 1]]
    assert fold_columns([]) == []


def test_findings_show_their_numbers_and_lists_their_range(single: Path) -> None:
    data = content(render(Store(single)))
    assert data["findings"][0][:4] == ["clock-drift", "noted", "acquisition/pulses", "the camera runs slow"]
    assert data["findings"][0][4] == "drift_ppm 50.2, knot_s 14 values, 0 to 13, residual_ms 14 values, -1 to 0.9894"
    assert [(row["code"], row["findings"]) for row in data["codes"]] == [("clock-drift", 1), ("unsorted", 1)]
    blank = {"code": "c", "action": "noted", "path": "p", "message": "m", "numbers": {"residual_ms": []}}
    assert finding_row(blank)[4] == "residual_ms no values"


def test_the_vocabulary_counts_each_type_over_streams_and_sessions(single: Path) -> None:
    words = {row["type"]: (row["modality"], row["events"]) for row in content(render(Store(single)))["vocabulary"]}
    assert words == {
        "lick_left": ("behavior", 11 + 5),
        "lick_right": ("behavior", 11 + 4),
        "reward": ("behavior", 11),
        "drifting_grating": ("stimulus", 8),
    }


def test_files_that_were_not_taken_are_listed_and_a_broken_line_is_shown(single: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(single, store)
    row = {"file": "old.nwb", "state": "refused", "object": "", "error": "which is NWB 1"}
    (store / "failed.jsonl").write_text(json.dumps(row) + "\nnot json\n")
    assert content(render(Store(store)))["failures"] == [
        row,
        {"file": "", "state": "unreadable line", "object": "failed.jsonl", "error": "not json"},
    ]


def test_a_refused_object_is_named_with_its_session(tmp_path: Path, recording: Path) -> None:
    lost = Finding(code="broken-object", path="units", action="refused", message="its index points past its end")
    plan = replace(session(recording, "s1"), findings=(lost,))
    data = content(render(Store(build(tmp_path / "store", plan))))
    assert data["sessions"][0]["refused"] == [["units", "its index points past its end"]]
    assert data["totals"]["refused"] == 1


def test_a_damaged_session_is_named_and_the_others_are_there(tmp_path: Path, recording: Path) -> None:
    store = build(tmp_path / "store", bare(recording, "a"), rich(recording, "b", 1))
    victim = store / Store(store).entries[0]["path"] / "zarr.json"
    victim.write_text(victim.read_text() + " ")
    rows = {row["session"]: row for row in content(render(Store(store)))["sessions"]}
    assert "is missing or damaged (sha256 differs from the manifest)" in rows["b"]["problem"]
    assert rows["b"]["pictures"] == []
    assert rows["a"]["problem"] == ""


def test_the_same_store_gives_the_same_page(single: Path, tmp_path: Path) -> None:
    shutil.copytree(single, tmp_path / "elsewhere" / "store")
    assert render(Store(single)) == render(Store(tmp_path / "elsewhere" / "store"))


def test_a_report_inside_the_store_is_refused(single: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(single), "--out", str(single / "report.html")]) == 2
    assert "where `make verify` takes it for a foreign file. Give a path outside of it" in capsys.readouterr().err


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nowhere"), "--out", str(tmp_path / "report.html")]) == 2
    assert "catalog.json is missing. Is this a token store?" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_rows_beyond_the_room_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_data, "MAX_POOL", 3)
    monkeypatch.setattr(report_data, "MAX_PER_SESSION", 4)
    pool = Pool()
    assert pool.add([("a",), ("b",), ("a",), ("c",), ("a",)]) == ([0, 1, 0, 2], 1)
    assert pool.add([("d",), ("b",)]) == ([1], 1)


# ---------------------------------------------------------------- odd sessions


def odd(recording: Path) -> list[SessionPlan]:
    """Sessions that lack nearly everything."""
    far = events("far", ("a", "b"), np.array([-1.5e9, 0.0, 3e7]))
    never = replace(stream("silent", "counts", "spikes", (30, 0, 5), first_unit=0))
    plan = rich(recording, "nan", 3)
    unknown = replace(
        plan.units, depth_um=np.full(5, np.nan, np.float32), region=[""] * 5, quality=[""] * 5, kind=["roi"] * 5
    )
    dark = Values("counts", (130, 3, 5), 1, missing_shard=(0, 130))
    return [
        bare(recording, "nothing"),
        bare(recording, "one-token", stream("lfp", "trace", "behavior", (1, 1, 1), channels=("x",))),
        bare(recording, "events-only", events("e", ("lick",), np.array([1.0]))),
        bare(recording, "no-events", events("e", (), np.zeros(0))),
        bare(recording, "far", far),
        bare(recording, "nan", nothing_but_nan("x", 40), nothing_but_nan("y", 1)),
        bare(recording, "no-sources", never),
        bare(recording, "no-names", stream("x", "trace", "behavior", (50, 9, 2))),
        replace(plan, dataset_id="odd", session_id="unknown", units=unknown, intervals={}, stimuli=plan.stimuli),
        replace(plan, dataset_id="odd", session_id="dark", streams=(replace(plan.streams[0], reader=dark),)),
    ]


def test_odd_sessions_have_a_report_too(tmp_path: Path, recording: Path) -> None:
    plans = odd(recording)
    page = render(Store(build(tmp_path / "store", *plans)))
    data = content(page)
    rows = {row["session"]: row for row in data["sessions"]}
    assert sorted(rows) == sorted(plan.session_id for plan in plans)
    assert [row["problem"] for row in rows.values()] == [""] * len(plans)
    assert data["totals"]["licences"] == [["CC-BY-4.0", 2], ["not given", 8]]
    drawn = {name: [titles(page)[i] for i in row["pictures"]] for name, row in rows.items()}
    assert drawn["nothing"] == drawn["no-events"] == []
    assert drawn["events-only"] == ["Everything on one time axis"]
    assert drawn["nan"] == ["Everything on one time axis", "Clocks"]


def test_an_empty_store_has_a_report(tmp_path: Path) -> None:
    page = render(Store(build(tmp_path / "store")))
    assert "This store holds no session." in page
    assert content(page)["totals"]["sessions"] == 0


def test_a_name_in_a_picture_is_printable_and_short() -> None:
    assert clean("a\x00b\n") == "a·b·"
    assert clean("x" * 30, 5) == "xxxx…"


def test_the_template_is_part_of_the_package() -> None:
    assert report.TEMPLATE.is_file()
