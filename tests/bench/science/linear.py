"""The classical baselines on a token store: Poisson GLM and ridge on lags, fitted on a session's own train split.

In: a store, as the model reads it. Out: predictions, penalties chosen on the valid split, as prep's References: one npz
a session, so that the evaluation compares them with the model's, sample by sample.

Features of encoding: behaviour at five lags, the movie's leading principal components at four frames; of decoding:
activity of all units at eleven lags of 100 ms; of co-smoothing: counts of the other units, in five bands of lags.
"""

from pathlib import Path

import numpy as np
from bench.science.regressions import poisson_glm, ridge

from prep.ceiling import Reference, save_references
from prep.store import Session, Store

BIN_NS = 20_000_000
BEHAVIOR_LAGS = (-10, -5, 0, 5, 10)  # bins; what comes after a spike tells about it as well
FRAME_LAGS = (0, 1, 2, 3)  # frames back
NUM_COMPONENTS = 40  # of the movie
DECODING_LAGS = range(-5, 6)  # of 100 ms
BANDS = ((-25, -10), (-10, -3), (-3, 4), (4, 11), (11, 26))  # bins
HIDDEN_EVERY = 5  # co-smoothing hides every fifth unit (train/masking.py)
Arrays = dict[str, np.ndarray]


class Course:
    """A session on bins of 20 ms: splits, behaviour, frames, activity."""

    def __init__(self, store: Store, index: int) -> None:
        self.entry, self.session = store.entries[index], store.session(index)
        spans = self.entry["splits"]
        start, stop = min(s[0] for s in spans), max(s[1] for s in spans)
        self.start_ns = np.arange(start // BIN_NS * BIN_NS, stop, BIN_NS)
        self.middle_ns = self.start_ns + BIN_NS // 2
        self.store = store

    def part(self, array: np.ndarray, times_ns: np.ndarray) -> Arrays:
        """Rows of each split; `test` is everything, so that there is a prediction for all times."""
        found = {"test": array}
        for label in ("train", "valid"):
            inside = np.zeros(len(times_ns), bool)
            for start, stop, name in self.entry["splits"]:
                inside |= (times_ns >= start) & (times_ns < stop) & (name == label)
            found[label] = array[inside]
        return found

    def streams(self, modality: str) -> list[dict]:
        """Descriptions of the streams of a modality."""
        return [s for s in self.entry["streams"] if s["modality"] == modality and s["kind"] in ("counts", "trace")]

    def behavior_at(self, times_ns: np.ndarray) -> np.ndarray:
        """(n, channels), standardised by train."""
        columns = []
        for stream in self.streams("behavior"):
            at, values = samples(self.session, stream)
            columns += [np.interp(times_ns, at, column) for column in values.T]
        found = np.stack(columns, 1)
        train = self.part(found, times_ns)["train"]
        return (found - train.mean(0)) / (train.std(0) + 1e-9)

    def screen_at(self, times_ns: np.ndarray) -> np.ndarray:
        """(n, lags * components): principal components of the frame that is shown, and of those before; 0 for none."""
        stream = next(s for s in self.entry["streams"] if s["kind"] == "frames")
        opened = self.session.stream(stream["name"])
        index = opened.read(slice(0, len(opened.start_ns)))[:, 0, 0]
        pixels = self.store.frames(stream["stimulus"])
        frames = pixels.read(0, pixels.spec.shape[0]).reshape(pixels.spec.shape[0], -1).astype(np.float32)
        components = principal(frames)
        last = np.searchsorted(opened.start_ns, times_ns, side="right") - 1
        found = []
        for lag in FRAME_LAGS:
            place = last - lag
            shown = (place >= 0) & (times_ns - opened.start_ns[place.clip(0)] < (lag + 1.5) * stream["duration_ns"])
            which = np.where(shown, index[place.clip(0)], -1)
            found.append(np.where((which >= 0)[:, None], components[which.clip(0)], 0.0))
        return np.concatenate(found, 1)


def samples(session: Session, stream: dict) -> tuple[np.ndarray, np.ndarray]:
    """Times (n,) ns and values (n, S) of all samples, in order; missing ones are interpolated over."""
    opened = session.stream(stream["name"])
    values = opened.read(slice(0, len(opened.start_ns))).astype(np.float64)
    num_samples = values.shape[2]
    times = (opened.start_ns[:, None] + np.arange(num_samples) * stream["sample_ns"]).reshape(-1)
    values = values.transpose(0, 2, 1).reshape(len(times), -1)
    if stream["kind"] == "counts":
        values[values == 255] = np.nan
    whole = np.isfinite(values).all(1)
    return times[whole], values[whole]


def principal(frames: np.ndarray) -> np.ndarray:
    """(F, components) of unit variance."""
    centred = frames - frames.mean(0)
    left, _, _ = np.linalg.svd(centred, full_matrices=False)
    return left[:, :NUM_COMPONENTS] * np.sqrt(len(frames))


def lagged(array: np.ndarray, lags: "tuple[int, ...] | range") -> np.ndarray:
    """(n, lags * columns): row k holds rows k + lag, the edge's beyond the edges."""
    rows = np.arange(len(array))
    return np.concatenate([array[(rows + lag).clip(0, len(array) - 1)] for lag in lags], 1)


def banded(counts: np.ndarray) -> np.ndarray:
    """(n, bands * units): roots of the spikes in bands of lags."""
    total = np.concatenate([np.zeros((1, counts.shape[1])), counts.cumsum(0)])
    rows = np.arange(len(counts))
    parts = [
        total[(rows + stop).clip(0, len(counts))] - total[(rows + start).clip(0, len(counts))] for start, stop in BANDS
    ]
    return np.sqrt(np.concatenate(parts, 1))


def scaled(array: np.ndarray, course: Course, times_ns: np.ndarray) -> Arrays:
    """By split, in train's standard deviations."""
    train = course.part(array, times_ns)["train"]
    mean, sd = train.mean(0), train.std(0) + 1e-6
    return course.part(((array - mean) / sd).astype(np.float32), times_ns)


def counts_on_bins(course: Course) -> np.ndarray:
    """(n, units) spikes."""
    stream = course.streams("spikes")[0]
    at, values = samples(course.session, stream)
    found = np.zeros((len(course.start_ns), values.shape[1]), np.float32)
    place = np.searchsorted(course.start_ns, at)
    inside = (place < len(found)) & (at >= course.start_ns[0])
    found[place[inside]] = values[inside]
    return found


def encoding_rows(course: Course) -> list[Reference]:
    """From behaviour alone, and from behaviour and stimulus."""
    stream = (course.streams("spikes") or course.streams("traces"))[0]
    is_spikes = stream["kind"] == "counts"
    targets = counts_on_bins(course) if is_spikes else None
    times, start = course.middle_ns, course.start_ns
    if targets is None:
        start, targets = samples(course.session, stream)
        times = start
    behavior = np.concatenate([course.behavior_at(times + lag * BIN_NS) for lag in BEHAVIOR_LAGS], 1)
    rows = []
    for visible in (("behavior",), ("behavior", "stimulus")):
        seen = behavior if len(visible) == 1 else np.concatenate([behavior, course.screen_at(times)], 1)
        fit = poisson_glm if is_spikes else ridge
        asked = course.part(targets.astype(np.float32 if is_spikes else np.float64), times)
        said = fit(scaled(seen, course, times), asked)
        rows.append(row(stream, "encoding", visible, start, said))
    return rows


def co_smoothing_rows(course: Course) -> list[Reference]:
    """Every fifth unit from the others."""
    stream = course.streams("spikes")[0]
    counts = counts_on_bins(course)
    hidden = np.arange(counts.shape[1])[::HIDDEN_EVERY]
    others = np.delete(counts, hidden, 1)
    said = np.full(counts.shape, np.nan)
    said[:, hidden] = poisson_glm(
        scaled(banded(others), course, course.middle_ns), course.part(counts[:, hidden], course.middle_ns)
    )
    return [row(stream, "co_smoothing", ("spikes",), course.start_ns, said)]


def decoding_rows(course: Course) -> list[Reference]:
    """Each behaviour stream from all units."""
    stream = (course.streams("spikes") or course.streams("traces"))[0]
    num = 5
    if stream["kind"] == "counts":
        counts = counts_on_bins(course)
        whole = len(counts) // num * num
        binned = np.sqrt(counts[:whole].reshape(-1, num, counts.shape[1]).sum(1))
    else:
        at, values = samples(course.session, stream)
        whole = len(course.middle_ns) // num * num
        middles = course.middle_ns[:whole].reshape(-1, num).mean(1)
        binned = np.stack([np.interp(middles, at, column) for column in values.T], 1)
    times = course.middle_ns[:whole].reshape(-1, num).mean(1)
    inputs = scaled(lagged(binned, DECODING_LAGS), course, times)
    rows = []
    for asked in course.streams("behavior"):
        at, values = samples(course.session, asked)
        targets = np.stack([np.interp(times, at, column) for column in values.T], 1)
        said = ridge(inputs, course.part(targets, times))
        each = np.stack([np.interp(at, times, column) for column in said.T], 1)
        rows.append(row(asked, "decoding", (stream["modality"],), at, each))
    return rows


def row(stream: dict, task: str, visible: tuple[str, ...], start_ns: np.ndarray, said: np.ndarray) -> Reference:
    """As the evaluation finds it."""
    names = tuple(map(str, range(said.shape[1])))
    return Reference(
        stream=stream["name"],
        task=task,
        visible=visible,
        start_ns=start_ns,
        values=said.astype(np.float32),
        sources=names,
    )


def write(store: Store, folder: Path) -> None:
    """Fit every session of a store; what is there already is not fitted again."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, entry in enumerate(store.entries):
        path = folder / f"{entry['session_id']}.npz"
        if path.exists():
            continue
        course = Course(store, index)
        rows = encoding_rows(course) + decoding_rows(course)
        if course.streams("spikes"):
            rows += co_smoothing_rows(course)
        save_references(path, rows)
