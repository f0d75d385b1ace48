"""The fixed protocol of scoring: planted cases whose figures are known, and equality with the common scorer.

In: recordings made here; the scorer of ../shared/science and the real files beside it, skipped where they are not.
Out: nothing.
"""

import dataclasses
import importlib.util
import itertools
import os
from pathlib import Path
from types import ModuleType

import h5py
import numpy as np
import pytest
from bench.science import protocol
from bench.science.protocol import PredictionError
from bench.science.recordings import HEADING, POSITION, SPLITS, TRACES, Recording, read

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("BRAINLOOM_NWB_DIR", ROOT.parent / "shared" / "nwb"))
SCORERS = [path / "score.py" for path in (FOLDER.parent / "science", ROOT.parent / "shared" / "science")]
SCORER = next((path for path in SCORERS if path.is_file()), None)
TASKS = ("hd", "pos", "cosmooth", "forecast", "forecast_ca")
FOLDS = (None, 0, 2, 4)


def head_direction(length_s: float = 200.0, num_units: int = 6, seed: int = 0) -> Recording:
    """A turning animal, and units tuned to its heading."""
    generator = np.random.default_rng(seed)
    time = 1000.0 + np.arange(0.0, length_s, 0.01)
    heading = np.cumsum(generator.normal(0, 0.06, len(time))) % (2 * np.pi)
    preferred = np.arange(num_units) * 2 * np.pi / num_units
    rate_hz = 20 * np.exp(4 * (np.cos(heading[:, None] - preferred) - 1)) + 0.5
    spikes = [time[generator.random(len(time)) < rate * 0.01] + 0.003 for rate in rate_hz.T]
    position = np.stack([np.cos(time / 7), np.sin(time / 9)], 1)
    behaviour = {"heading_time": time, "heading": heading, "position_time": time, "position": position}
    return Recording(name="turning", spike_times=tuple(spikes), **behaviour)


def miniscope(num_frames: int = 3000, num_rois: int = 4, seed: int = 0) -> Recording:
    """Traces that decay and are pushed."""
    generator = np.random.default_rng(seed)
    traces = np.zeros((num_frames, num_rois))
    for k in range(1, num_frames):
        traces[k] = 0.95 * traces[k - 1] + generator.normal(size=num_rois) * np.arange(1, num_rois + 1)
    return Recording(name="decaying", trace_time=50 + np.arange(num_frames) / 30, traces=traces + 3)


def recording_for(task: str) -> Recording:
    return miniscope() if task == "forecast_ca" else head_direction()


def predict(recording: Recording, task: str, fold: int | None = None, noise: float = 0.0, seed: int = 1) -> dict:
    """The truth (of counts: their smooth rate), disturbed."""
    time = protocol.queries(recording, task, "test", fold)
    name = protocol.time_name(task)

    def disturb(array: np.ndarray) -> np.ndarray:
        return array + noise * np.random.default_rng(seed).normal(size=array.shape)

    if task == "hd":
        return {name: time, "angle": disturb(recording.heading_at(time))}
    if task == "pos":
        return {name: time, **dict(zip("xz", disturb(recording.position_at(time)).T, strict=True))}
    if task == "forecast_ca":
        return {name: time, "pred": disturb(protocol.future_frames(recording, time))}
    if task == "cosmooth":
        units = protocol.held_out(recording)
        rate = protocol.bin_counts(recording, time)[:, units] * 0.5 + 0.05
        return {name: time, "rate": rate * np.exp(disturb(rate * 0)), "unit": np.array(units), "bin_s": np.array(0.02)}
    rate = protocol.future_counts(recording, time) * 0.5 + 0.05
    return {name: time, "rate": rate * np.exp(disturb(rate * 0))}


# ---------------------------------------------------------------- splits and queries


@pytest.mark.parametrize("fold", [None, *range(5)])
def test_blocks_leave_two_seconds_between_splits_and_lie_in_the_period(fold: int | None) -> None:
    recording = head_direction()
    parts = sorted(part for parts in recording.blocks(fold).values() for part in parts)
    start, stop = recording.period
    assert parts[0][0] == start and parts[-1][1] == pytest.approx(stop)
    gaps = [b[0] - a[1] for a, b in itertools.pairwise(parts)]
    assert gaps == pytest.approx([2.0] * len(gaps))


def test_the_test_blocks_of_five_folds_cover_the_period_once() -> None:
    recording = head_direction()
    blocks = [recording.blocks(fold)["test"][0] for fold in range(5)]
    start, stop = recording.period
    assert sum(b - a for a, b in blocks) == pytest.approx(stop - start - 8)
    assert blocks == sorted(blocks)


def test_a_sixth_fold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fold 5: expected one of 0\.\.4"):
        head_direction().blocks(5)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("fold", FOLDS)
def test_nothing_that_a_query_may_use_or_asks_lies_outside_of_its_block(task: str, fold: int | None) -> None:
    recording = recording_for(task)
    past_s, future_s = {"forecast": (1.5, 0.5), "forecast_ca": (44 / 30, 0.5)}.get(task, (1.0, 0.5))
    for split in SPLITS:
        parts = recording.blocks(fold)[split]
        for time in protocol.queries(recording, task, split, fold):
            assert any(a - 1e-6 <= time - past_s and time + future_s <= b + 1e-6 for a, b in parts)


def test_counts_are_half_open_so_that_a_spike_on_an_edge_is_counted_once() -> None:
    recording = Recording(name="edge", spike_times=(np.array([1.0, 1.5, 2.0]),))
    assert recording.counts(np.array([1.0, 1.5]), 0.0, 0.5).tolist() == [[1], [1]]


# ---------------------------------------------------------------- planted scores


def test_a_heading_that_is_off_by_a_constant_has_that_error_also_across_north() -> None:
    recording = head_direction()
    prediction = predict(recording, "hd")
    prediction["angle"] = (prediction["angle"] + np.radians(10)) % (2 * np.pi)
    figures = protocol.score(recording, "hd_acausal", prediction)
    assert figures["mdae_deg"] == pytest.approx(10) and figures["mae_deg"] == pytest.approx(10)
    assert protocol.score(recording, "hd", predict(recording, "hd"))["r2_circ"] == pytest.approx(1)


def test_the_mean_of_train_gives_no_bits_and_the_mean_of_test_no_d2() -> None:
    recording = head_direction()
    prediction, units = predict(recording, "cosmooth"), protocol.held_out(recording)
    ones = np.ones_like(prediction["rate"])
    of_train = {**prediction, "rate": ones * protocol.train_rate(recording)[units]}
    assert protocol.score(recording, "cosmooth", of_train)["bps_train"] == pytest.approx(0, abs=1e-12)
    counts = protocol.bin_counts(recording, prediction["t"])[:, units]
    of_test = protocol.score(recording, "cosmooth", {**prediction, "rate": ones * counts.mean(0)})
    assert of_test["d2"] == pytest.approx(0, abs=1e-12) and of_test["bps_nlb"] == pytest.approx(0, abs=1e-12)


def test_the_counts_themselves_have_all_of_the_deviance() -> None:
    recording = head_direction()
    time = protocol.queries(recording, "forecast")
    figures = protocol.score(recording, "forecast", {"t0": time, "rate": protocol.future_counts(recording, time)})
    assert figures["d2"] == pytest.approx(1, abs=1e-6) and figures["d2_pooled"] == pytest.approx(1, abs=1e-6)


def test_bits_by_horizon_are_those_of_the_bins_of_that_horizon() -> None:
    recording = head_direction()
    prediction = predict(recording, "forecast")
    spoiled = prediction["rate"].copy()
    spoiled[:, 15:] = 5.0
    before, after = (
        protocol.score(recording, "forecast", {**prediction, "rate": r}) for r in (prediction["rate"], spoiled)
    )
    assert after["bps_train_0-100ms"] == before["bps_train_0-100ms"]
    assert after["bps_train_100-300ms"] == before["bps_train_100-300ms"]
    assert after["bps_train_300-500ms"] < 0 < before["bps_train_300-500ms"]


def test_persistence_has_no_skill_and_the_truth_all_of_it() -> None:
    recording = miniscope()
    time = protocol.queries(recording, "forecast_ca")
    last = recording.traces[np.searchsorted(recording.trace_time, time)]
    stays = {"t0": time, "pred": np.repeat(last[:, None], 15, 1)}
    figures = protocol.score(recording, "forecast_ca", stays)
    assert figures["skill_vs_persistence"] == pytest.approx(0, abs=1e-12) and figures["r_change"] == 0
    assert protocol.score(recording, "forecast_ca", predict(recording, "forecast_ca"))["r"] == pytest.approx(1)


@pytest.mark.parametrize("task", TASKS)
def test_the_order_of_a_prediction_does_not_matter(task: str) -> None:
    recording = recording_for(task)
    prediction = predict(recording, task, noise=0.3)
    order = np.random.default_rng(0).permutation(len(prediction[protocol.time_name(task)]))
    shuffled = {name: array if name in ("unit", "bin_s") else array[order] for name, array in prediction.items()}
    assert protocol.score(recording, task, shuffled) == protocol.score(recording, task, prediction)


# ---------------------------------------------------------------- refusals


def test_a_query_without_an_answer_is_an_error_that_names_it() -> None:
    recording = head_direction()
    prediction = {name: array[1:] for name, array in predict(recording, "hd").items()}
    first = protocol.queries(recording, "hd")[0]
    with pytest.raises(PredictionError, match=f"1 of .* query times have no prediction .the first: {first:.4f} s"):
        protocol.score(recording, "hd", prediction)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": None}, "the prediction lacks rate; found t, unit, bin_s"),
        ({"unit": np.array([0, 1])}, r"expected units \[0, 5\] in bins of 0.02 s"),
        ({"bin_s": np.array(0.05)}, r"expected units \[0, 5\] in bins of 0.02 s"),
        ({"rate": np.ones((3, 2))}, r"rate is \(3, 2\), expected \(\d+, 2\), all finite"),
    ],
)
def test_a_prediction_of_the_wrong_form_is_refused(change: dict, message: str) -> None:
    recording = head_direction()
    prediction = {
        name: array for name, array in {**predict(recording, "cosmooth"), **change}.items() if array is not None
    }
    with pytest.raises(PredictionError, match=message):
        protocol.score(recording, "cosmooth", prediction)


def test_a_value_that_is_not_finite_is_refused() -> None:
    recording = head_direction()
    prediction = predict(recording, "hd")
    prediction["angle"][7] = np.nan
    with pytest.raises(PredictionError, match="all finite"):
        protocol.score(recording, "hd", prediction)


def test_a_prediction_comes_back_from_its_file(tmp_path: Path) -> None:
    recording = head_direction()
    prediction = predict(recording, "cosmooth", noise=0.3)
    found = protocol.load(protocol.save(tmp_path / "deep", "cosmooth", prediction))
    assert protocol.score(recording, "cosmooth", found) == protocol.score(recording, "cosmooth", prediction)


# ---------------------------------------------------------------- comparisons


@pytest.mark.parametrize("task", TASKS)
def test_a_prediction_does_not_differ_from_itself(task: str) -> None:
    recording = recording_for(task)
    prediction = predict(recording, task, noise=0.3)
    assert set(protocol.compare(recording, task, prediction, prediction).values()) == {(0.0, 0.0, 0.0)}


@pytest.mark.parametrize(
    ("task", "figure", "is_better_above"),
    [
        ("hd", "mdae_deg", False),
        ("cosmooth", "bps_train", True),
        ("forecast", "bps_train", True),
        ("forecast_ca", "skill_vs_persistence", True),
    ],
)
def test_a_planted_difference_is_found_and_changes_its_sign_with_the_order(
    task: str, figure: str, is_better_above: bool
) -> None:
    recording = recording_for(task)
    good, bad = (predict(recording, task, noise=noise) for noise in (0.1, 0.6))
    value, low, high = protocol.compare(recording, task, good, bad)[figure]
    assert (low > 0) if is_better_above else (high < 0)
    assert low <= value <= high
    assert protocol.compare(recording, task, bad, good)[figure] == pytest.approx((-value, -high, -low))
    each = [protocol.score(recording, task, prediction)[figure] for prediction in (good, bad)]
    assert value == pytest.approx(each[0] - each[1])


def test_two_predictions_that_are_equally_good_are_not_told_apart() -> None:
    recording = head_direction()
    pairs = [[predict(recording, "hd", noise=0.3, seed=2 * seed + side) for side in (0, 1)] for seed in range(10)]
    covered = [low <= 0 <= high for _, low, high in (protocol.compare(recording, "hd", *p)["mae_deg"] for p in pairs)]
    assert sum(covered) >= 8


def test_pairing_finds_what_two_separate_intervals_hide() -> None:
    recording = head_direction()
    angle = predict(recording, "hd")["angle"]
    hard = np.where(np.arange(len(angle)) // 250 % 2, 0.8, 0.05)  # every second segment is sixteen times as hard
    worse = {"t": protocol.queries(recording, "hd"), "angle": angle + hard * 1.05}
    better = {**worse, "angle": angle + hard}
    _, high_of_better = protocol.intervals(recording, "hd", better)["mae_deg"]
    low_of_worse, _ = protocol.intervals(recording, "hd", worse)["mae_deg"]
    assert low_of_worse < high_of_better
    assert protocol.compare(recording, "hd", better, worse)["mae_deg"][2] < 0


def test_folds_are_pooled_window_by_window() -> None:
    recording = head_direction()
    good, bad = ([predict(recording, "forecast", fold, noise) for fold in range(5)] for noise in (0.1, 0.6))
    value, low, high = protocol.compare_folds(recording, "forecast", good, bad)["bps_train"]
    assert 0 < low <= value <= high
    pooled = [protocol.score_folds(recording, "forecast", each)["bps_train"] for each in (good, bad)]
    assert value == pytest.approx(pooled[0] - pooled[1])
    alone = [protocol.score(recording, "forecast", each, "test", fold)["bps_train"] for fold, each in enumerate(good)]
    assert min(alone) <= pooled[0] <= max(alone)
    with pytest.raises(PredictionError, match="5 folds of one prediction, 4 of the other"):
        protocol.compare_folds(recording, "forecast", good, bad[:4])


# ---------------------------------------------------------------- equality with the common scorer


def scorer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("common_scorer", SCORER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path: Path, recording: Recording) -> Path:
    """The recording in the layout of the real files."""
    with h5py.File(path, "w") as file:
        if recording.spike_times:
            file["units/spike_times"] = np.concatenate(recording.spike_times)
            file["units/spike_times_index"] = np.cumsum([len(times) for times in recording.spike_times])
            file[f"{HEADING}/data"], file[f"{HEADING}/timestamps"] = recording.heading, recording.heading_time
            for axis, values in zip("xz", recording.position.T, strict=True):
                file[f"{POSITION}/{axis}/data"], file[f"{POSITION}/{axis}/timestamps"] = values, recording.position_time
        else:
            file[f"{TRACES}/data"], file[f"{TRACES}/timestamps"] = recording.traces, recording.trace_time
    return path


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    for recording in (head_direction(), miniscope()):
        found = read(write(tmp_path / f"{recording.name}.nwb", recording))
        for field in dataclasses.fields(recording):
            np.testing.assert_equal(getattr(found, field.name), getattr(recording, field.name))


def check_equality(path: Path, task: str, fold: int | None) -> None:
    """Queries, blocks, figures and intervals of a disturbed prediction are those of the common scorer."""
    ours, module = read(path), scorer()
    theirs = module.Rec(path)
    theirs.fold = fold
    for split in SPLITS:
        np.testing.assert_array_equal(
            protocol.queries(ours, task, split, fold), module.queries(theirs, task, split, protocol.BIN_S)
        )
        np.testing.assert_allclose(ours.blocks(fold)[split], theirs.blocks()[split], rtol=0, atol=1e-9)
    prediction = predict(ours, task, fold, noise=0.4)
    expected = module.score(theirs, task, prediction)
    found = protocol.score(ours, task, prediction, "test", fold)
    shared = {name: value for name, value in found.items() if name in expected}
    assert len(shared) == len(found) >= 2
    assert shared == pytest.approx({name: expected[name] for name in shared}, abs=6e-5)  # it prints four digits
    found_ci = protocol.intervals(ours, task, prediction, "test", fold)
    for name, interval in expected["ci95"].items():
        assert found_ci[name] == pytest.approx(interval, abs=6e-5)


@pytest.mark.skipif(SCORER is None, reason=f"no common scorer at {SCORERS[0]}")
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("fold", FOLDS)
def test_figures_are_those_of_the_common_scorer(tmp_path: Path, task: str, fold: int | None) -> None:
    check_equality(write(tmp_path / "made.nwb", recording_for(task)), task, fold)


@pytest.mark.skipif(SCORER is None or not FOLDER.is_dir(), reason=f"no common scorer, or no real files at {FOLDER}")
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("fold", FOLDS)
def test_figures_of_the_real_files_are_those_of_the_common_scorer(task: str, fold: int | None) -> None:
    name = "miniscope_A0634.nwb" if task == "forecast_ca" else "head_direction_A2929.nwb"
    check_equality(FOLDER / name, task, fold)
