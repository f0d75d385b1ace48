"""The fixed protocol: what is asked of a model on a real recording, how its answer is scored, and how two are compared.

In: a Recording, a task, a prediction. Out: query times; figures with intervals; paired differences with intervals.

What a prediction may use. Head direction and position: the spikes of all units in [t - .5, t + .5) s, or, causal, in
[t - 1, t). Co-smoothing: the spikes of the units that are not held out, within .5 s of the bin's centre. Forecast: the
spikes of all units in [t0 - 1.5, t0). Forecast of traces: the last 45 frames. Never behaviour.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from bench.science.metrics import METRICS, Figures, Rows, angle_rows, count_rows, place_rows, rows_at, trace_rows
from bench.science.recordings import Recording

KINDS = {  # task: what scores it
    "hd": "hd",
    "hd_acausal": "hd",
    "hd_causal": "hd",
    "pos": "pos",
    "cosmooth": "cosmooth",
    "forecast": "forecast",
    "forecast_ca": "forecast_ca",
}
STEP_S = BIN_S = 0.02
PAST_S, FUTURE_S = 1.0, 0.5  # margins of a block, so that nothing that may be seen lies outside of it
FORECAST_PAST_S, FORECAST_S = 1.5, 0.5
NUM_BINS = round(FORECAST_S / BIN_S)
PAST_FRAMES, NUM_FRAMES = 45, 15
HELD_OUT_EVERY = 5  # units 0, 5, 10, … are held out of co-smoothing
SAME_TIME_S = 1e-3
NUM_RESAMPLES, SEED = 300, 0
SEGMENT = {
    "hd": 250,
    "pos": 250,
    "cosmooth": 250,
    "forecast": 10,
    "forecast_ca": 20,
}  # windows resampled together: ~5-10 s
ANSWERS = {
    "hd": ("angle",),
    "pos": ("x", "z"),
    "cosmooth": ("rate", "unit", "bin_s"),
    "forecast": ("rate",),
    "forecast_ca": ("pred",),
}
Prediction = dict[str, np.ndarray]  # the arrays of {task}.npz
Interval = tuple[float, float]


class PredictionError(ValueError):
    """A prediction that does not answer what was asked."""


# ---------------------------------------------------------------- what is asked


def held_out(recording: Recording) -> list[int]:
    """Units that co-smoothing predicts and never sees."""
    return list(range(0, recording.num_units, HELD_OUT_EVERY))


def queries(recording: Recording, task: str, split: str = "test", fold: int | None = None) -> np.ndarray:
    """Query times in s; of bins the centres, of a forecast its t0, of a forecast of traces the last seen frame."""
    parts = recording.blocks(fold)[split]
    return np.concatenate([_queries_in(recording, KINDS[task], start, stop) for start, stop in parts])


def _queries_in(recording: Recording, kind: str, start: float, stop: float) -> np.ndarray:
    if kind == "forecast_ca":
        first, last = np.searchsorted(recording.trace_time, [start, stop])
        last = min(last, len(recording.trace_time) - 1)
        return recording.trace_time[np.arange(first + PAST_FRAMES - 1, last - NUM_FRAMES + 1, NUM_FRAMES)]
    if kind == "forecast":
        return _grid(start + FORECAST_PAST_S, stop - FORECAST_S, FORECAST_S)
    if kind == "cosmooth":
        return _grid(start + PAST_S, stop - FUTURE_S - BIN_S, BIN_S) + BIN_S / 2
    return _grid(start + PAST_S, stop - FUTURE_S, STEP_S)


def _grid(start: float, stop: float, step: float) -> np.ndarray:
    return start + step * np.arange(int(np.floor((stop - start) / step + 1e-9)) + 1)


def time_name(task: str) -> str:
    """The array of a prediction that holds its times."""
    return "t0" if KINDS[task].startswith("forecast") else "t"


# ---------------------------------------------------------------- what is true


def bin_counts(recording: Recording, time: np.ndarray) -> np.ndarray:
    """(bins, units): spikes in bins with these centres."""
    return recording.counts(time, -BIN_S / 2, BIN_S / 2)


def future_counts(recording: Recording, time: np.ndarray) -> np.ndarray:
    """(windows, 25, units): spikes in the bins of [t0, t0 + .5)."""
    return np.stack([recording.counts(time, h * BIN_S, (h + 1) * BIN_S) for h in range(NUM_BINS)], 1)


def future_frames(recording: Recording, time: np.ndarray) -> np.ndarray:
    """(windows, 15, ROIs): the frames after the one at `time`."""
    index = np.searchsorted(recording.trace_time, time)
    return recording.traces[index[:, None] + np.arange(1, NUM_FRAMES + 1)]


def train_rate(recording: Recording, fold: int | None = None) -> np.ndarray:
    """(units,): spikes per bin in train."""
    parts = recording.blocks(fold)["train"]
    num = [sum(((times >= a) & (times < b)).sum() for a, b in parts) for times in recording.spike_times]
    return np.array(num) / sum(stop - start for start, stop in parts) * BIN_S


def train_moments(recording: Recording, fold: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(ROIs,) mean and standard deviation of the traces in train."""
    time = recording.trace_time
    parts = recording.blocks(fold)["train"]
    frames = np.concatenate([recording.traces[(time >= start) & (time < stop)] for start, stop in parts])
    return frames.mean(0), frames.std(0)


# ---------------------------------------------------------------- scores


def score(
    recording: Recording, task: str, prediction: Prediction, split: str = "test", fold: int | None = None
) -> Figures:
    """Figures of a prediction. Raises PredictionError where it does not answer every query."""
    return METRICS[KINDS[task]](rows_of(recording, task, prediction, split, fold))


def intervals(
    recording: Recording, task: str, prediction: Prediction, split: str = "test", fold: int | None = None
) -> dict[str, Interval]:
    """95 % interval of each figure, by resampling segments of contiguous windows."""
    rows = rows_of(recording, task, prediction, split, fold)
    figures = METRICS[KINDS[task]]
    return _percentiles([figures(rows_at(rows, index)) for index in _resamples([_num(rows)], SEGMENT[KINDS[task]])])


def rows_of(
    recording: Recording, task: str, prediction: Prediction, split: str = "test", fold: int | None = None
) -> Rows:
    """What each window adds to the figures."""
    kind = KINDS[task]
    time = queries(recording, task, split, fold)
    answer = _answer(recording, task, prediction, time)
    if kind == "hd":
        return angle_rows(recording.heading_at(time), answer["angle"])
    if kind == "pos":
        return place_rows(recording.position_at(time), np.stack([answer["x"], answer["z"]], 1))
    if kind == "forecast_ca":
        return _trace_rows(recording, time, answer["pred"], fold)
    mean = train_rate(recording, fold)
    if kind == "forecast":
        return count_rows(future_counts(recording, time), answer["rate"], mean, bands=True)
    units = held_out(recording)
    return count_rows(bin_counts(recording, time)[:, None, units], answer["rate"][:, None], mean[units])


def _trace_rows(recording: Recording, time: np.ndarray, predicted: np.ndarray, fold: int | None) -> Rows:
    mean, sd = train_moments(recording, fold)
    last = recording.traces[np.searchsorted(recording.trace_time, time)]
    return trace_rows((future_frames(recording, time) - mean) / sd, (predicted - mean) / sd, (last - mean) / sd)


def _answer(recording: Recording, task: str, prediction: Prediction, time: np.ndarray) -> Prediction:
    """The prediction at the query times, in their order; what lacks or has the wrong shape is an error."""
    kind, name = KINDS[task], time_name(task)
    missing = [key for key in (name, *ANSWERS[kind]) if key not in prediction]
    if missing:
        raise PredictionError(
            f"{task}: the prediction lacks {', '.join(missing)}; found {', '.join(prediction) or 'nothing'}"
        )
    given = np.asarray(prediction[name])
    answer = {key: np.asarray(prediction[key], dtype=float) for key in ANSWERS[kind] if key not in ("unit", "bin_s")}
    for key, array in answer.items():
        expected = (len(given), *_shape(recording, kind))
        if array.shape != expected or not np.isfinite(array).all():
            raise PredictionError(f"{task}: {key} is {array.shape}, expected {expected}, all finite")
    if kind == "cosmooth" and (list(prediction["unit"]) != held_out(recording) or float(prediction["bin_s"]) != BIN_S):
        raise PredictionError(f"{task}: expected units {held_out(recording)} in bins of {BIN_S} s")
    index = _match(task, time, given)
    return {key: array[index] for key, array in answer.items()}


def _shape(recording: Recording, kind: str) -> tuple[int, ...]:
    """Of the answer to one query."""
    if kind == "cosmooth":
        return (len(held_out(recording)),)
    if kind == "forecast":
        return NUM_BINS, recording.num_units
    return (NUM_FRAMES, recording.traces.shape[1]) if kind == "forecast_ca" else ()


def _match(task: str, wanted: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Index into `given` of each wanted time."""
    order = np.argsort(given)
    place = np.clip(np.searchsorted(given[order], wanted - SAME_TIME_S), 0, max(len(given) - 1, 0))
    found = np.abs(given[order][place] - wanted) <= SAME_TIME_S if len(given) else np.zeros(len(wanted), bool)
    if not found.all():
        lost = f"{(~found).sum()} of {len(wanted)} query times have no prediction"
        raise PredictionError(f"{task}: {lost} (the first: {wanted[~found][0]:.4f} s)")
    return order[place]


# ---------------------------------------------------------------- comparisons


def compare(
    recording: Recording, task: str, a: Prediction, b: Prediction, split: str = "test", fold: int | None = None
) -> dict[str, tuple[float, float, float]]:
    """Of each figure a - b, and its 95 % interval over the same resampled segments of the same windows."""
    return _compare(task, [tuple(rows_of(recording, task, each, split, fold) for each in (a, b))])


def compare_folds(
    recording: Recording, task: str, a: Sequence[Prediction], b: Sequence[Prediction]
) -> dict[str, tuple[float, float, float]]:
    """The same over the test blocks of folds 0, 1, …, pooled: each window once, against its own fold's train."""
    if len(a) != len(b):
        raise PredictionError(f"{task}: {len(a)} folds of one prediction, {len(b)} of the other")
    pairs = enumerate(zip(a, b, strict=True))
    return _compare(
        task, [tuple(rows_of(recording, task, each, "test", fold) for each in both) for fold, both in pairs]
    )


def score_folds(recording: Recording, task: str, predictions: Sequence[Prediction]) -> Figures:
    """Figures over the test blocks of folds 0, 1, …, pooled."""
    return METRICS[KINDS[task]](
        _pool([rows_of(recording, task, each, "test", k) for k, each in enumerate(predictions)])
    )


def _compare(task: str, pairs: Sequence[tuple[Rows, ...]]) -> dict[str, tuple[float, float, float]]:
    figures = METRICS[KINDS[task]]
    pooled = [_pool([pair[side] for pair in pairs]) for side in (0, 1)]

    def difference(index: np.ndarray | slice) -> Figures:
        a, b = (figures(rows_at(rows, index)) for rows in pooled)
        return {name: a[name] - b[name] for name in a}

    resamples = _resamples([_num(pair[0]) for pair in pairs], SEGMENT[KINDS[task]])
    spread = _percentiles([difference(index) for index in resamples])
    return {name: (value, *spread[name]) for name, value in difference(slice(None)).items()}


def _pool(parts: Sequence[Rows]) -> Rows:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _num(rows: Rows) -> int:
    return len(next(iter(rows.values())))


def _resamples(nums: Sequence[int], segment: int) -> list[np.ndarray]:
    """Windows of each resample: as many segments as there are, drawn with replacement; none crosses a fold's border."""
    first = np.concatenate([[0], np.cumsum(nums)])
    segments = [
        np.arange(start, min(start + segment, first[i + 1]))
        for i in range(len(nums))
        for start in range(first[i], first[i + 1], segment)
    ]
    generator = np.random.default_rng(SEED)
    draws = [generator.integers(0, len(segments), len(segments)) for _ in range(NUM_RESAMPLES)]
    return [np.concatenate([segments[k] for k in draw]) for draw in draws]


def _percentiles(figures: Sequence[Figures]) -> dict[str, Interval]:
    found = {name: np.percentile([each[name] for each in figures], [2.5, 97.5]) for name in figures[0]}
    return {name: (float(low), float(high)) for name, (low, high) in found.items()}


# ---------------------------------------------------------------- files


def save(folder: Path, task: str, prediction: Prediction) -> Path:
    """Write {task}.npz."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{task}.npz"
    np.savez_compressed(path, **prediction)
    return path


def load(path: Path) -> Prediction:
    """Read a prediction file."""
    with np.load(path) as file:
        return dict(file)
