"""The synthetic brain: its files are genuine NWB, its references are right, and a line is not enough to reach them.

In: sessions of `prep.synthetic`, some written to a temporary folder. Out: nothing.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pynwb
import pytest
from numpy.typing import NDArray

from prep import brain, brain_draw, ceiling, synthetic
from prep.brain import Floats
from prep.brain_draw import Samples
from prep.ceiling import Reference
from prep.synthetic import PRESETS, Session

KNOWN = ("behavior", "stimulus")


# ---- builders


@pytest.fixture(scope="module")
def spikes() -> Session:
    return synthetic.synthesize(replace(PRESETS["demo"][0], duration_s=300), seed=0)


@pytest.fixture(scope="module")
def traces() -> Session:
    return synthetic.synthesize(replace(PRESETS["demo"][3], duration_s=300), seed=0)


@pytest.fixture(scope="module")
def rows(spikes: Session, traces: Session) -> dict[str, list[Reference]]:
    return {"spikes": synthetic.references(spikes), "traces": synthetic.references(traces)}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path]:
    folder = tmp_path_factory.mktemp("brain")
    return synthetic.write_brain(folder / "nwb", folder / "truth", "test", seed=0), folder / "truth"


def row(rows: list[Reference], task: str, visible: tuple[str, ...], stream: str | None = None) -> Floats:
    (found,) = [r for r in rows if (r.task, r.visible) == (task, visible) and stream in (None, r.stream)]
    return found.values.astype(np.float64)


def counts_of(session: Session) -> Floats:
    """(n, U) counted from the recorded spike times, in the bins of the references."""
    assert isinstance(session.recorded, list)
    first = session.course.start_ns // brain.BIN_NS
    num_bins = len(ceiling.bin_start_ns(session.course))
    bins = [np.floor(times_s * 1e9 / brain.BIN_NS).astype(np.int64) - first for times_s in session.recorded]
    return np.stack([np.bincount(b, minlength=num_bins) for b in bins], 1).astype(np.float64)


def dff_of(session: Session) -> Floats:
    assert isinstance(session.recorded, Samples)
    return session.recorded.data.astype(np.float64)


def split_masks(times_s: Floats) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Train, valid, test: 70/10/20 % of contiguous time with gaps of 2 s."""
    since = times_s - times_s[0]
    a, b = 0.7 * since[-1], 0.8 * since[-1]
    return since < a - 1, (since >= a + 1) & (since < b - 1), since >= b + 1


def d2(counts: Floats, rate: Floats, null: Floats) -> float:
    def deviance(mean: Floats) -> float:
        ratio = np.where(counts > 0, counts, 1.0) / mean
        return float((counts * np.log(ratio) - counts + mean).sum())

    return 1 - deviance(rate) / deviance(np.broadcast_to(null, counts.shape))


def r2(data: Floats, prediction: Floats, null: Floats) -> float:
    return float(np.mean(1 - ((data - prediction) ** 2).sum(0) / ((data - null) ** 2).sum(0)))


def scorer(session: Session) -> Any:
    """prediction -> D2 (counts) or R2 (traces) on the test split."""
    data = counts_of(session) if session.spec.kind == "spikes" else dff_of(session)
    train, _, test = split_masks(activity_times(session))
    score = d2 if session.spec.kind == "spikes" else r2
    null = data[train].mean(0)
    return lambda prediction: score(data[test], prediction[test], null)


def activity_times(session: Session) -> Floats:
    """(n,) seconds since the start of the course: centres of the bins, or times of the frames."""
    if session.imaging is not None:
        return session.imaging.frames_s
    return np.asarray((ceiling.bin_start_ns(session.course) - session.course.start_ns) / 1e9 + 0.01, np.float64)


def linear_prediction(session: Session, data: Floats, lags_s: Floats) -> Floats:
    """Ridge on lagged pixels (their 64 principal components) and behaviour, its strength chosen per unit on valid."""
    times_s, origin_s = activity_times(session), session.course.start_ns / 1e9
    behavior = {k: (v.times_s - origin_s, v.data.astype(np.float64)) for k, v in session.behavior.items()}
    angle_t, angle = behavior["head_direction"]
    tracks = [(angle_t, np.cos(angle)), (angle_t, np.sin(angle)), behavior["running_speed"], behavior["pupil_diameter"]]
    pixels = session.movie.reshape(len(session.movie), -1).astype(np.float64)
    pixels -= pixels.mean(0)
    components = pixels @ np.linalg.eigh(pixels.T @ pixels)[1][:, -64:]
    components /= components[:, -1].std()  # the weak ones stay weak: a ridge shrinks them first
    shown_s = session.shown.times_s - origin_s
    columns = []
    for lag_s in lags_s:
        columns += [np.interp(times_s - lag_s, t, x)[:, None] / x.std() for t, x in tracks]
        latest = np.searchsorted(shown_s, times_s - lag_s, side="right") - 1
        columns.append(components[session.shown.data[np.maximum(latest, 0)].astype(np.int64)])
    features = np.concatenate(columns, 1)
    train, valid, _ = split_masks(times_s)
    features -= features[train].mean(0)
    mean = data[train].mean(0)
    gram, moment = features[train].T @ features[train], features[train].T @ (data[train] - mean)
    values, vectors = np.linalg.eigh(gram)
    rotated, weights = features @ vectors, vectors.T @ moment
    fits = np.stack([mean + rotated @ (weights / (values + a)[:, None]) for a in 10.0 ** np.arange(8)])
    best_U = ((fits - data)[:, valid] ** 2).sum(1).argmin(0)
    return np.asarray(fits[best_U, :, np.arange(data.shape[1])].T, np.float64)


def walk(group: h5py.Group) -> Iterator[h5py.Dataset]:
    for item in group.values():
        if isinstance(item, h5py.Dataset):
            yield item
        elif item.name != "/specifications":
            yield from walk(item)


# ---- the references are right


def test_the_spike_reference_predicts_better_than_any_distortion_of_it(
    spikes: Session, rows: dict[str, list[Reference]]
) -> None:
    score, exact = scorer(spikes), row(rows["spikes"], "encoding", KNOWN)
    best = score(exact)
    assert best > 0.15
    for worse in (np.roll(exact, 10, 0), np.roll(exact, -10, 0), exact**1.15, exact**0.85, 1.1 * exact, 0.9 * exact):
        assert score(worse) < best
    assert 0.5 * best < score(row(rows["spikes"], "encoding", ("behavior",))) < 0.9 * best


def test_the_trace_reference_predicts_better_than_any_distortion_of_it(
    traces: Session, rows: dict[str, list[Reference]]
) -> None:
    score, exact = scorer(traces), row(rows["traces"], "encoding", KNOWN)
    best = score(exact)
    assert best > 0.3
    mean = exact.mean(0)
    for worse in (
        np.roll(exact, 2, 0),
        np.roll(exact, -2, 0),
        mean + 1.2 * (exact - mean),
        mean + 0.8 * (exact - mean),
    ):
        assert score(worse) < best
    assert 0.5 * best < score(row(rows["traces"], "encoding", ("behavior",))) < 0.95 * best


def test_the_phase_of_each_roi_is_part_of_the_reference(traces: Session, rows: dict[str, list[Reference]]) -> None:
    assert traces.imaging is not None
    mean = brain.expected_counts(traces.law, traces.course, {"heading", "speed", "pupil", "stimulus"})
    without = brain.fluorescence(replace(traces.imaging, offset_U=0 * traces.imaging.offset_U), mean)
    score = scorer(traces)
    assert score(row(rows["traces"], "encoding", KNOWN)) > score(without.astype(np.float64))


@pytest.mark.parametrize("visible", [KNOWN, ("behavior",)])
def test_the_exact_reference_is_the_average_over_everything_that_is_hidden(visible: tuple[str, ...]) -> None:
    spec = replace(PRESETS["test"][0], duration_s=20)
    session, rng, num_draws = synthetic.synthesize(spec, 0), np.random.default_rng(5), 300
    exact = pooled(row(synthetic.references(session), "encoding", visible))
    total, squares, means = np.zeros_like(exact), np.zeros_like(exact), []
    for _ in range(num_draws):
        shown = session.shown if "stimulus" in visible else brain_draw.draw_presentation(rng, spec)
        course = brain_draw.draw_course(rng, spec, session.law, session.behavior, shown)
        counts = pooled(ceiling.per_bin(course.counts_TU).astype(np.float64))
        total, squares = total + counts, squares + counts**2
        means.append(counts.mean())
    mean = total / num_draws
    z = (mean - exact) / np.sqrt((squares / num_draws - mean**2) / num_draws)
    # 1,980 scores: were they independent, z.std() would be 1.00 +- 0.016; the shared latent makes it a few times that
    assert 0.9 < z.std() < 1.1
    # not z.mean(): counts are skewed, and that alone pulls a t score below zero
    assert abs(np.mean(means) - exact.mean()) < 4 * np.std(means, ddof=1) / np.sqrt(num_draws)


def pooled(bins: Floats) -> Floats:
    """Sums over 200 ms: enough spikes for the variance over draws to be known without a floor."""
    return np.add.reduceat(bins[: len(bins) // 10 * 10], np.arange(0, len(bins) // 10 * 10, 10))


@pytest.mark.parametrize("kind", ["spikes", "traces"])
def test_references_have_the_mean_of_what_was_recorded(kind: str, request: pytest.FixtureRequest) -> None:
    session, found = request.getfixturevalue(kind), request.getfixturevalue("rows")[kind]
    data = counts_of(session) if kind == "spikes" else dff_of(session)
    for visible in (KNOWN, ("behavior",)):
        assert row(found, "encoding", visible).mean() == pytest.approx(data.mean(), rel=0.03)


def test_spike_references_are_calibrated(spikes: Session, rows: dict[str, list[Reference]]) -> None:
    counts, num_blocks = counts_of(spikes), 20
    block = np.arange(len(counts)) * num_blocks // len(counts)
    for task, visible in (("encoding", KNOWN), ("encoding", ("behavior",)), ("co_smoothing", ("spikes",))):
        rate = row(rows["spikes"], task, visible)
        decile = np.clip(np.searchsorted(np.quantile(rate, np.linspace(0, 1, 11)), rate, side="right") - 1, 0, 9)
        cell = (block[:, None] * 10 + decile).ravel()
        missed = np.bincount(cell, (counts - rate).ravel(), num_blocks * 10).reshape(num_blocks, 10)
        error = missed.sum(0) / (missed.std(0, ddof=1) * np.sqrt(num_blocks))
        assert np.abs(error).max() < 4, (task, visible, error)


def test_knowing_the_latent_and_the_earlier_spikes_beats_encoding(
    spikes: Session, rows: dict[str, list[Reference]]
) -> None:
    score = scorer(spikes)
    bound = row(rows["spikes"], "co_smoothing", ("spikes",))
    assert score(bound) > score(row(rows["spikes"], "encoding", KNOWN))
    assert score(bound) > max(score(bound**power) for power in (0.9, 1.1))


@pytest.mark.parametrize(("stream", "least"), [("head_direction", 0.9), ("running_speed", 0.7)])
def test_the_ideal_decoder_is_sharp_and_calibrated(
    stream: str, least: float, spikes: Session, rows: dict[str, list[Reference]]
) -> None:
    data = spikes.behavior[stream].data.astype(np.float64)
    data = np.stack([np.cos(data), np.sin(data)], 1) if stream == "head_direction" else data[:, None]
    mean = row(rows["spikes"], "decoding", ("spikes",), stream)
    assert r2(data, mean, data.mean(0)) > least
    assert r2(data, np.roll(mean, 10, 0), data.mean(0)) < r2(data, mean, data.mean(0))
    slope = ((data - data.mean(0)) * (mean - mean.mean(0))).sum(0) / ((mean - mean.mean(0)) ** 2).sum(0)
    np.testing.assert_allclose(slope, 1.0, atol=0.05)


# ---- a line is not enough


def test_a_linear_model_reaches_at_most_60_percent_of_the_spike_ceiling(
    spikes: Session, rows: dict[str, list[Reference]]
) -> None:
    counts, score = counts_of(spikes), scorer(spikes)
    fit = linear_prediction(spikes, counts, np.arange(-0.1, 0.5, 0.1))
    linear = max(score(np.maximum(fit, floor * counts.mean(0))) for floor in (0.02, 0.1, 0.3))
    print(f"spikes: linear {linear:.3f}, ceiling {score(row(rows['spikes'], 'encoding', KNOWN)):.3f}")
    assert 0 < linear <= 0.6 * score(row(rows["spikes"], "encoding", KNOWN))


def test_a_linear_model_reaches_at_most_60_percent_of_the_trace_ceiling(
    traces: Session, rows: dict[str, list[Reference]]
) -> None:
    score = scorer(traces)
    linear = score(linear_prediction(traces, dff_of(traces), np.arange(-0.1, 1.2, 0.1)))
    print(f"traces: linear {linear:.3f}, ceiling {score(row(rows['traces'], 'encoding', KNOWN)):.3f}")
    assert 0 < linear <= 0.6 * score(row(rows["traces"], "encoding", KNOWN))


def test_units_fire_between_1_and_10_hz_on_average(spikes: Session, traces: Session) -> None:
    for session in (spikes, traces):
        rate_hz = session.course.counts_TU[brain.BURN_STEPS :].mean(0) / brain.STEP_S
        assert rate_hz.min() > 1 and rate_hz.max() < 10


# ---- the files


def test_files_open_in_pynwb_and_validate_without_errors(written: tuple[list[Path], Path]) -> None:
    for path, spec in zip(written[0], PRESETS["test"], strict=True):
        assert not pynwb.validate(path=str(path))
        with pynwb.NWBHDF5IO(str(path), "r") as io:
            nwb = io.read()
            assert (nwb.subject.subject_id, nwb.session_id) == (spec.subject_id, spec.session_id)
            assert (nwb.units is not None) == (spec.kind == "spikes")
            assert ("movie" in nwb.stimulus) == spec.has_stimulus
            assert len(nwb.trials) > 3
            heading = nwb.processing["behavior"]["CompassDirection"]["head_direction"]
            assert heading.unit == "radians" and heading.data[:].min() >= 0 and heading.data[:].max() < 2 * np.pi
            if spec.has_stimulus:
                template = nwb.stimulus["movie"].indexed_timeseries
                assert template.data.dtype == np.uint8 and nwb.stimulus["movie"].data[:].max() < len(template.data)
            if spec.kind == "traces":
                dff = nwb.processing["ophys"]["DfOverF"]["dff"]
                assert dff.data.shape == (len(dff.timestamps), spec.num_units)
                assert "scan_offset_s" in dff.rois.table.colnames


def test_nothing_of_the_ground_truth_is_in_the_files(written: tuple[list[Path], Path]) -> None:
    telling = ("rate", "tuning", "latent", "coupling", "weight", "gain", "expected", "truth", "law", "seed")
    for path, spec in zip(written[0], PRESETS["test"], strict=True):
        session = synthetic.synthesize(spec, 0)
        hidden = [*vars(session.law).values(), session.course.latent_TZ, session.course.counts_TU]
        hidden += [reference.values for reference in synthetic.references(session)]
        with h5py.File(path, "r") as file:
            found = list(walk(file))
            assert len(found) == len({d.name for d in found}) < 80
            for dataset in found:
                words = dataset.name.lower().strip("/").split("/")
                assert words[-1] == "imaging_rate" or not set(telling) & set(words[-1].split("_")), dataset.name
                if dataset.dtype.kind == "f" and dataset.size > 1:
                    assert not any(same_numbers(dataset[()], value) for value in hidden), dataset.name


def same_numbers(stored: NDArray[Any], value: NDArray[Any]) -> bool:
    """Whether an array holds the other's numbers, whole or transposed."""
    return any(stored.shape == v.shape and np.allclose(stored, v, rtol=1e-3) for v in (value, value.T))


def test_the_same_seed_gives_the_same_arrays_and_another_seed_others(
    written: tuple[list[Path], Path], tmp_path: Path
) -> None:
    again = synthetic.write_brain(tmp_path / "nwb", tmp_path / "truth", "test", seed=0)
    for first, second in zip(written[0], again, strict=True):
        with h5py.File(first, "r") as a, h5py.File(second, "r") as b:
            for dataset in walk(a):
                if dataset.dtype.kind in "iufb":
                    np.testing.assert_array_equal(dataset[()], b[dataset.name][()], err_msg=dataset.name)
    for first in written[1].iterdir():
        with np.load(first) as a, np.load(tmp_path / "truth" / first.name) as b:
            assert set(a) == set(b) and all(np.array_equal(a[key], b[key]) for key in a)
    other = synthetic.synthesize(PRESETS["test"][0], seed=1)
    assert not np.array_equal(counts_of(other), counts_of(synthetic.synthesize(PRESETS["test"][0], seed=0)))


def test_a_clock_that_starts_far_from_zero_keeps_sub_microsecond_spike_times(written: tuple[list[Path], Path]) -> None:
    session = synthetic.synthesize(PRESETS["test"][0], seed=0)
    at_zero = replace(session.course, start_ns=0)
    near, far = (brain_draw.draw_spike_times(np.random.default_rng(0), c) for c in (at_zero, session.course))
    origin_s = session.course.start_ns / 1e9
    assert origin_s > 1.2e7
    np.testing.assert_allclose(np.concatenate(far) - origin_s, np.concatenate(near), atol=1e-8, rtol=0)
    assert isinstance(session.recorded, list)
    with h5py.File(written[0][0], "r") as file:
        stored = file["units/spike_times"][()]
    assert stored.dtype == np.float64
    np.testing.assert_array_equal(stored, np.concatenate(session.recorded))


def test_device_clocks_run_off_their_nominal_rate(spikes: Session) -> None:
    interval_s = np.diff(spikes.behavior["running_speed"].times_s).mean()
    assert 60 * interval_s == pytest.approx(1 / (1 + 30e-6), abs=1e-9)


def test_frames_repeat_but_not_too_often(spikes: Session) -> None:
    shown = np.bincount(spikes.shown.data.astype(np.int64), minlength=len(spikes.movie))
    assert spikes.movie.shape == (1500, 24, 24) and shown.max() <= 3 and shown.min() >= 1


def test_all_sessions_of_a_seed_share_one_movie(spikes: Session, traces: Session) -> None:
    np.testing.assert_array_equal(spikes.movie, traces.movie)


def test_the_demo_has_every_kind_of_session() -> None:
    demo = PRESETS["demo"]
    assert [s.kind for s in demo].count("spikes") == 3 and [s.kind for s in demo].count("traces") == 2
    assert sum(not s.has_stimulus for s in demo) == 1 and sum(not s.has_behavior for s in demo) == 1
    assert len({s.subject_id for s in demo}) > 1 and len({s.session_id for s in demo}) == len(demo)
    assert any(abs(s.start_s - 1.2e7) < 1 for s in demo) and all(300 <= s.duration_s <= 600 for s in demo)


def test_a_session_without_behavior_has_one_reference_and_no_behavior_in_its_file(tmp_path: Path) -> None:
    session = synthetic.synthesize(replace(PRESETS["test"][0], has_behavior=False), seed=0)
    assert [(r.task, r.visible) for r in synthetic.references(session)] == [
        ("encoding", ("stimulus",)),
        ("co_smoothing", ("spikes",)),
    ]
    with h5py.File(synthetic.write_session(session, tmp_path, None), "r") as file:
        assert "behavior" not in file["processing"] and list(tmp_path.iterdir()) == [tmp_path / "mini01_t01.nwb"]


def test_the_pulses_of_the_camera_are_those_of_the_session_on_its_own_clock(tmp_path: Path) -> None:
    for path, spec in zip(synthetic.write_brain(tmp_path, None, "clocks", 0), PRESETS["clocks"], strict=True):
        with h5py.File(path, "r") as file:
            session_s, camera_s = (file[f"acquisition/{n}_pulses/timestamps"][()] for n in ("sync", "camera"))
            volts = file["acquisition/photodiode/data"][()]
        expected_s = brain_draw.on_camera_clock(spec, session_s)
        nearest = np.abs(camera_s[:, None] - expected_s).min(axis=1)
        assert len(camera_s) < len(session_s) and nearest.max() < 1e-4
        assert ((volts[:-1] < 2.5) & (volts[1:] >= 2.5)).sum() == len(session_s)


def test_the_truth_file_names_its_rows_on_the_grid_of_the_session_clock(written: tuple[list[Path], Path]) -> None:
    with np.load(written[1] / "t01.npz") as truth, h5py.File(written[0][0], "r") as file:
        index = json.loads(str(truth["index"]))
        assert [(r["stream"], r["task"], r["visible"], r["ceiling_kind"]) for r in index] == [
            ("spikes", "encoding", ["behavior", "stimulus"], "exact"),
            ("spikes", "encoding", ["behavior"], "exact"),
            ("spikes", "co_smoothing", ["spikes"], "bound"),
            ("head_direction", "decoding", ["spikes"], "bound"),
            ("running_speed", "decoding", ["spikes"], "bound"),
        ]
        for entry in index:
            start_ns, values = truth[entry["start_ns"]], truth[entry["values"]]
            assert start_ns.dtype == np.int64 and values.dtype == np.float32
            assert values.shape == (len(start_ns), len(entry["sources"])) and np.isfinite(values).all()
            assert entry["stream"] != "spikes" or (start_ns % 20_000_000 == 0).all()
        heading = file["processing/behavior/CompassDirection/head_direction/timestamps"][()]
        np.testing.assert_array_equal(truth[index[3]["start_ns"]], np.rint(heading * 1e9).astype(np.int64))


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(pynwb.NWBHDF5IO, "write", fail)
    with pytest.raises(OSError, match="disk full"):
        synthetic.write_session(synthetic.synthesize(PRESETS["test"][2], 0), tmp_path, None)
    assert not list(tmp_path.iterdir())


def test_an_unknown_preset_is_named_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"preset 'huge' is unknown; choose one of \['clocks', 'demo', 'test'\]"):
        synthetic.write_brain(tmp_path, None, "huge", seed=0)


def test_the_command_prints_a_line_per_session(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    synthetic.configure(parser)
    assert synthetic.main(parser.parse_args(["--out", str(tmp_path), "--preset", "test"])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == sorted(str(p) for p in tmp_path.glob("*.nwb"))
    assert "20 units" in lines[0] and lines[0].endswith("80 s, spikes + behavior + stimulus")
