"""The pictures of the report show the numbers of the store, where most streams are, and all regions.

In: a small hand-built store. Out: nothing.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from report_builders import ORIGIN_NS, REGIONS, bare, build, events, rich, svgs, titles
from store_builders import SECOND_NS, Values, a_recording, session

from prep.report import MAX_PICTURED, pictured, render
from prep.report_data import unit_columns
from prep.report_plots import jitter_ms, residual_rows
from prep.report_stretch import Stretch, bars_inside, choose_stretch, count_image, frame_at, trace_image, trace_samples
from prep.store import Store


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_recording(tmp_path_factory.mktemp("recording"))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, recording: Path) -> Path:
    return build(tmp_path_factory.mktemp("single") / "store", rich(recording, "s1", 1))


def test_a_stretch_ends_with_the_last_token_in_it(tmp_path: Path, recording: Path) -> None:
    licks = events("licks", ("lick",), np.array([1.0, 2.0, 3.5]))
    opened = Store(build(tmp_path / "store", bare(recording, "s1", licks))).session(0)
    assert choose_stretch([opened.stream("licks")]) == Stretch(ORIGIN_NS + SECOND_NS, ORIGIN_NS + 3_500_000_001)


def test_pictures_are_shared_out_among_the_datasets() -> None:
    rows = [
        {"dataset": name, "modalities": ["spikes"], "streams": [1], "tokens": tokens}
        for name, number in (("big", 50), ("small", 2))
        for tokens in range(number)
    ]
    assert pictured(rows)[:4] == [49, 51, 48, 50], "in turn, the fullest first"
    assert len(pictured(rows)) == MAX_PICTURED


def test_a_session_shows_all_that_it_has_with_regions_and_session_seconds(single: Path) -> None:
    page = render(Store(single))
    assert titles(page) == ["d1", "Everything on one time axis", "Units", "Clocks"]
    shown = svgs(page)[1]
    for text in ("session time (s)", "12,000,000", "spikes", "running", "cm/s", "drifting_grating", "trials", "movie"):
        assert f">{text}<" in shown
    assert all(f">{name}<" in shown for name in REGIONS if name)
    assert ">residual (ms)<" in svgs(page)[3]


def test_the_stretch_is_where_most_streams_are(single: Path) -> None:
    opened = Store(single).session(0)
    long = opened.stream("spikes")
    times = ORIGIN_NS + np.arange(4000) * 100_000_000  # 400 s
    streams = [
        replace(long, start_ns=times),
        replace(opened.stream("running"), start_ns=times[3000:3300]),
        replace(opened.stream("roi"), start_ns=times[2900:3500]),
    ]
    found = choose_stretch(streams)
    assert found is not None
    assert times[2990] <= found.start_ns < found.stop_ns <= times[3310]
    assert found.stop_ns - found.start_ns == 24 * SECOND_NS
    assert choose_stretch([]) is None


def test_the_overview_shows_the_numbers_of_the_store(single: Path) -> None:
    store = Store(single)
    opened = store.session(0)
    stretch = Stretch(ORIGIN_NS + 2 * SECOND_NS, ORIGIN_NS + 7 * SECOND_NS)
    spikes, roi, movie = opened.stream("spikes"), opened.stream("roi"), opened.stream("movie")

    counts = spikes.read(slice(20, 70)).astype(np.float64)
    counts[counts == 255] = np.nan
    flat = counts.transpose(1, 0, 2).reshape(3, -1)
    assert np.array_equal(count_image(spikes, stretch, np.array([2, 0])), flat[[2, 0]], equal_nan=True)

    time_s, values = trace_samples(roi, slice(20, 40), np.array([1]))
    expected = roi.read(slice(20, 40))[:, 1].reshape(-1)
    assert np.array_equal(values[:, 0], expected.astype(np.float64), equal_nan=True)
    assert time_s[0, 0] == (roi.start_ns[20] + 7_000_000) / 1e9

    image = trace_image(roi, stretch, np.array([0]), 150)  # 5 s in columns as long as a sample
    assert np.array_equal(image[0, 1:59], roi.read(slice(20, 40))[:, 0].reshape(-1)[1:59].astype(float), equal_nan=True)
    assert np.isnan(image[0, 70:]).all(), "the stream has a hole there"

    assert frame_at(movie, (int(movie.start_ns[7]) + 50_000_000) / 1e9) == movie.read(slice(7, 8))[0, 0, 0]
    assert frame_at(movie, 12_000_100.0) == frame_at(movie, 0.0) == -1
    origin_s = ORIGIN_NS / 1e9
    assert bars_inside(opened, "trials", stretch).tolist() == [
        [origin_s + 2, origin_s + 3],
        [origin_s + 5, origin_s + 5],
    ]


def test_a_gap_in_time_breaks_the_line(single: Path) -> None:
    running = Store(single).session(0).stream("running")
    late = running.start_ns.copy()
    late[10:] += 5 * SECOND_NS
    _, values = trace_samples(replace(running, start_ns=late), slice(5, 15), np.array([0]))
    assert len(values) == 11
    assert np.isnan(values[5]).all()


def test_rates_and_skewness_are_of_the_units_that_were_observed(tmp_path: Path, recording: Path) -> None:
    plan = session(recording, "s1")
    dark = Values("counts", (130, 3, 5), 1, missing_shard=(0, 130))
    units = unit_columns(Store(build(tmp_path / "a", plan)).session(0))
    spikes = Store(tmp_path / "a").session(0).stream("spikes")
    assert units.rate_hz[:3] == pytest.approx(spikes.mean / 0.02, rel=1e-4)
    assert np.isnan(units.rate_hz[3:]).all() and np.isnan(units.skewness[:3]).all()
    hidden = replace(plan, streams=(replace(plan.streams[0], reader=dark), *plan.streams[1:]))
    assert np.isnan(unit_columns(Store(build(tmp_path / "b", hidden)).session(0)).rate_hz).all()


def test_jitter_is_zero_on_a_regular_clock_and_absent_where_there_is_none(single: Path) -> None:
    opened = Store(single).session(0)
    running = opened.stream("running")
    assert jitter_ms(running).tolist() == [0, 0, 0]
    late = running.start_ns + np.where(np.arange(125) == 60, 4_000_000, 0)
    assert jitter_ms(replace(running, start_ns=late))[2] == 4.0
    assert jitter_ms(opened.stream("spikes")) is None
    assert jitter_ms(opened.stream("licks")) is None


def test_residuals_are_drawn_over_their_seconds_or_their_numbers() -> None:
    finding = {"code": "clock-mapped", "path": "p", "numbers": {"drift_ppm": 3.0, "residual_ms": [1.0, 2.0]}}
    ((title, x_label, x, y, y_label),) = residual_rows(finding)
    assert (title, x_label, x.tolist(), y.tolist(), y_label) == (
        "clock-mapped · p",
        "number of the knot",
        [0.0, 1.0],
        [1.0, 2.0],
        "residual_ms",
    )
    numbers = {"residual_ms": [1.0, 2.0], "knot_s": [10.0, 20.0], "short_s": [1.0]}
    assert residual_rows({**finding, "numbers": numbers})[0][2].tolist() == [10.0, 20.0]
