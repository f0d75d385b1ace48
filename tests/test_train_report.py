"""The report of a run says what its rows say, shows it without a network, and works at any stage of a run.

In: run folders made by hand. Out: one HTML file, read as text and in a headless Chromium.
"""

import html
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_builders import browser, chromium, svgs
from run_builders import HOSTILE, scores, write_incidents, write_steps
from train_builders import handmade_run, prepare_run, tiny_run, tiny_store

from train import report
from train.__main__ import main
from train.metrics import read_metrics
from train.run_folder import RunFolder

NEEDS_BROWSER = pytest.mark.skipif(chromium() is None and "CI" not in os.environ, reason="no Chromium is installed")
RUN = replace(tiny_run(num_steps=20), validate_every=5)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """A run that has done all its steps, with a checkpoint, incidents and a name that wants to be markup."""
    out = tmp_path_factory.mktemp("runs") / "a <b>run"
    handmade_run(out, store, RUN)
    write_steps(out, RUN, 20, num_sessions=40)
    write_incidents(out)
    return out


def page_of(run_dir: Path, *arguments: str) -> str:
    assert main(["report", str(run_dir), *arguments]) == 0
    return (run_dir / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(finished: Path) -> str:
    return page_of(finished, "--windows", "3")


def rows_of(page: str, section: str) -> list[list[str]]:
    """The cells of all rows of a section's tables, as text."""
    part = page.split(f'<h2 id="{section}">')[1].split("<h2 ")[0]
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", part, re.DOTALL)
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in rows]
    return [[html.unescape(re.sub(r"<[^>]+>", "", cell)).strip() for cell in row] for row in cells]


def test_the_numbers_are_those_of_the_rows(page: str, finished: Path) -> None:
    steps = read_metrics(finished)
    families = {row[0]: row[1:] for row in rows_of(page, "learning")}
    for family in RUN.train.families:
        own = [row for row in steps if row["family"] == family]
        expected = [f"{np.mean([row[name] for row in own]):+.4f}" for name in ("loss", "nats_spikes")]
        assert families[family][:3] == [str(len(own)), *expected]
    assert "All 20 steps are done." in page
    for tile in (
        "<b>20</b><span>of 20 steps",
        "<b>40 s</b>",
        "<b>10.0</b><span>unit-hours",
        "<b>1,010</b><span>tokens/s",
    ):
        assert tile in page, tile
    assert "<b>140 k</b><span>core parameters" in page and "<b>2</b><span>ranks" in page
    assert "took 2 s each (median); 1 GFLOP/s by formula" in page
    for part in (
        "data wait 12.5%",
        "forward 25.0%",
        "backward 50.0%",
        "communication 6.2%",
        "optimizer 3.1%",
        "other 3.1%",
    ):
        assert part in page


def test_scores_are_by_task_region_and_session_with_the_best_and_the_worst(page: str) -> None:
    rows = rows_of(page, "validation")
    expected = f"{0.5 - 1 / 21:.3f}"
    assert ["spikes encoding from behavior + stimulus", "1,000", expected, expected, ""] in rows
    assert "By session: the best and the worst of 40" in page and "28 between them are in validation.jsonl" in page
    names = [row[0] for row in rows if row[0].startswith("d1/s")]
    assert names == [f"d1/s{place:02}" for place in (*range(6), *range(34, 40))]
    worst = next(row for row in rows if row[0] == "d1/s39")
    assert worst[1:] == [f"{0.5 - 1 / 21 - 0.78:.3f}"] * 4 and float(worst[1]) < 0
    region = next(row for row in rows if row[0] == "VISp")
    assert len(region) == 4, "behaviour has no region"


def test_incidents_and_checkpoints_are_listed(page: str, finished: Path) -> None:
    assert ["3", "skipped", "loss None, 2 windows"] in rows_of(page, "incidents")
    folder = finished / "checkpoints" / "step-00000001"
    size = sum(path.stat().st_size for path in folder.iterdir())
    step, shown, _, sealed = rows_of(page, "checkpoints")[1]
    assert (step, shown, sealed) == ("1", report.size(size), "yes")


def test_what_a_run_says_is_text_and_never_markup(page: str) -> None:
    assert HOSTILE not in page and page.count(html.escape(HOSTILE, quote=False)) == 2, "a region and an incident"
    assert "a <b>run" not in page and "<title>a &lt;b&gt;run ·" in page
    assert "<script" not in page and page.count("<img ") == len(re.findall(r'<img src="data:image/svg', page)) == 5


def test_the_page_needs_nothing_and_is_small(page: str) -> None:
    assert len(page.encode()) < 3e6
    assert set(re.findall(r'(?:src|href)="([^#][^:"]*:)', page)) == {"data:"}
    drawn = svgs(page)
    assert len(drawn) == 5 and all("var(--ink)" in svg and "#010203" not in svg for svg in drawn)
    assert sum("predicted" in svg for svg in drawn) == 1, "predicted beside recorded"


def test_a_run_without_a_step_says_so(store: Path, tmp_path: Path) -> None:
    out = prepare_run(tmp_path / "new", store, RUN)
    page = page_of(out)
    assert page.count("No step has been done yet.") == 3 and "There is no checkpoint yet" in page
    assert "the first comes after 5 steps" in page and not svgs(page)
    page = page_of(prepare_run(tmp_path / "blind", store, replace(RUN, validate_every=0)))
    assert "This run does not validate: validate_every is 0." in page


def test_a_run_that_goes_on_has_curves_but_no_picture_before_its_first_checkpoint(store: Path, tmp_path: Path) -> None:
    out = prepare_run(tmp_path / "young", store, RUN)
    write_steps(out, RUN, 7)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "family": "enc')  # a row that is being written
    page = page_of(out)
    assert "7 of 20 steps are done; the last one " in page and "There is no checkpoint yet." in page
    assert "There is no checkpoint yet, and so no model that could predict." in page
    assert len(svgs(page)) == 4 and "By session</h3>" in page


def test_a_checkpoint_that_cannot_be_read_is_named(finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "damaged")
    (out / "checkpoints" / "step-00000001" / "state.json").write_text("{}")
    assert "The newest checkpoint could not be asked: " in page_of(out)
    assert "Pictures were not asked for." in page_of(out, "--windows", "0")


def test_numbers_that_are_not_finite_do_not_stop_a_report(store: Path, tmp_path: Path) -> None:
    out = prepare_run(tmp_path / "bad", store, RUN)
    write_steps(out, RUN, 4, gradient_norm=float("nan"), nats_traces=float("inf"))
    nothing = [{**row, "deviance_explained": None} for row in scores(4, ["d1/s0"], ["VISp"])]
    row = {"step": 4, "num_windows": 1, "scores": nothing, "seconds": 1.0}
    (out / "validation.jsonl").write_text(json.dumps(row) + "\n")
    page = page_of(out)
    assert "<td>co_smoothing</td>" in page and ["spikes co-smoothing from spikes", "1,000", "", "none", ""] in rows_of(
        page, "validation"
    )


def test_a_run_of_many_steps_has_a_small_page(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = prepare_run(tmp_path / "long", store, RUN)
    write_steps(out, RUN, 3)
    template: dict[str, Any] = read_metrics(out)[-1]
    many = [{**template, "step": step, "loss": 1 / (1 + step)} for step in range(20_000)]
    monkeypatch.setattr(RunFolder, "steps", property(lambda self: many))
    page = report.render(RunFolder(out), 0, 0.0)
    assert "All 20,000" not in page and len(page.encode()) < 1e6


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message == (
        f"train report: {tmp_path} is no run folder: it has no config.yaml. Give the OUT of a `make train`.\n"
    )


@NEEDS_BROWSER
def test_the_page_opens_in_a_browser_without_network_or_complaint(page: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    with browser() as opened:
        for width, theme in ((1280, "light"), (400, "dark")):
            opened.open(tmp_path / "report.html", width=width, theme=theme)
            opened.run("Promise.all([...document.images].map(image => image.decode()))")
            assert opened.run("[...document.images].every(image => image.naturalWidth > 500)")
            assert opened.run("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the window"
            assert opened.screenshot(tmp_path / f"{theme}.png").stat().st_size > 50_000
        assert opened.run("document.querySelector('h1').textContent") == "a <b>run"
        assert not opened.complaints and all(url.startswith(("file:", "data:")) for url in opened.requests)
