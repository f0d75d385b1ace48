"""A picture of what the model predicts beside what was recorded, on a stretch that it has not seen.

In: a trained model and its store. Out: a figure or a PNG: head direction or other behaviour, spikes with rates, traces.
"""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from train.dataset import split_windows
from train.evaluate import spread, suits
from train.masking import BEHAVIOR, TASKS, Task, task_mask
from train.sources import token_streams
from train.trained import Trained

Array = npt.NDArray[Any]
NUM_WINDOWS = 20
NUM_UNITS = 40
NUM_TRACES = 5
PREDICTED = "#e08a00"
RATES = LinearSegmentedColormap.from_list("rates", [(*mpl.colors.to_rgb(PREDICTED), alpha) for alpha in (0.0, 1.0)])


def draw(trained: Trained, label: str, path: Path) -> None:
    """Save `figure` as a PNG, where there is one."""
    drawn = figure(trained, label)
    if drawn is not None:
        drawn.savefig(path, dpi=110)


def figure(trained: Trained, label: str, num_windows: int = NUM_WINDOWS) -> Figure | None:
    """One panel per kind of prediction that the store allows, of a run of neighbouring windows; None without any."""
    tried = [(task, session) for task in _shown_tasks() if (session := _session(trained, label, task)) is not None]
    predicted = [(*pair, _predict(trained, label, *pair, num_windows)) for pair in tried]
    panels = [(task, session, stretch) for task, session, stretch in predicted if len(stretch["truth"])]
    if not panels:
        return None
    drawn = Figure(figsize=(11, 3.2 * len(panels)), layout="constrained")
    for axis, (task, session, stretch) in zip(drawn.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        entry = trained.store.entries[session]
        panel = {"spikes": _raster, "traces": _traces, "behavior": _behavior, "events": _events}[task.modality]
        panel(axis, trained, session, stretch)
        seen = " + ".join(task.visible)
        axis.set_title(
            f"{task.modality}: {task.family.replace('_', '-')} from {seen}   ({entry['session_id']}, {label})"
        )
        axis.set_xlabel("time in the split (s)")
    return drawn


def _shown_tasks() -> list[Task]:
    """Decoding, then encoding from all there is; spikes before traces."""
    order = {"decoding": 0, "encoding": 1}
    shown = [task for task in TASKS if task.family in order and task.visible != ("behavior",)]
    best: dict[str, Task] = {}
    for task in sorted(shown, key=lambda task: (order[task.family], -len(task.visible))):
        best.setdefault(task.modality, task)
    return list(best.values())


def _session(trained: Trained, label: str, task: Task) -> int | None:
    """The first that has what the task needs, and a window of the split."""
    entries = trained.store.entries
    return next((i for i, entry in enumerate(entries) if suits(task, entry) and spread(trained, label, i, 1)), None)


def _predict(trained: Trained, label: str, task: Task, session: int, num_windows: int) -> dict[str, Array]:
    """Samples of a run of neighbouring windows: time (n,), source (n,), truth (n,), prediction (n,), null (n,)."""
    context_s = trained.run.data.context_s
    windows = split_windows(trained.store, label, context_s, context_s)
    starts = [windows.locate(i)[1] for i in windows.of_sessions().get(session, range(0))[:num_windows]]
    parts = []
    for start in starts:
        window = trained.reader.read(session, start, windows.context_ns)
        mask = task_mask(task, window.tokens, context_s)
        prediction = trained.predict([window], [mask])[0]
        asked = np.flatnonzero(mask.asked)
        observed = window.observed[asked]
        sample = np.arange(observed.shape[1])
        time_s = window.tokens.start_s[asked][:, None] + sample * window.sample_s[asked][:, None]
        time_s = time_s + (start - starts[0]) / 1e9
        source = np.repeat(window.tokens.source[asked][:, None], len(sample), axis=1)
        columns: dict[str, Array] = {
            "time_s": time_s,
            "source": source,
            "truth": window.labels[asked],
            "prediction": prediction,
        }
        parts.append({name: column[observed] for name, column in columns.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _series(stretch: dict[str, Array], source: int) -> tuple[Array, Array, Array]:
    own = np.flatnonzero(stretch["source"] == source)
    own = own[np.argsort(stretch["time_s"][own])]
    return stretch["time_s"][own], stretch["truth"][own], stretch["prediction"][own]


def _raster(axis: Axes, trained: Trained, session: int, stretch: dict[str, Array]) -> None:
    """Predicted rate as colour (relative to the unit's range), recorded spikes as dots."""
    units = np.unique(stretch["source"])[:NUM_UNITS]
    times, column = np.unique(stretch["time_s"].round(6), return_inverse=True)
    rates = np.full((len(units), len(times)), np.nan)  # a unit may not be observed all the time
    own = np.isin(stretch["source"], units)
    rates[np.searchsorted(units, stretch["source"][own]), column[own]] = stretch["prediction"][own]
    low, high = np.nanmin(rates, 1, keepdims=True), np.nanmax(rates, 1, keepdims=True)
    shade = (rates - low) / np.maximum(high - low, 1e-9)
    stop_s = float(stretch["time_s"].max()) + 0.02
    axis.imshow(shade, aspect="auto", origin="lower", cmap=RATES, extent=(0, stop_s, -0.5, len(units) - 0.5))
    for row, unit in enumerate(units):
        time_s, counts, _ = _series(stretch, int(unit))
        axis.plot(time_s[counts > 0], np.full(int((counts > 0).sum()), row), "|", color=_ink(), ms=3.5, mew=0.7)
    axis.grid(False)
    axis.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    axis.set_ylabel("unit (marks: spikes,\ncolour: predicted rate)")


def _events(axis: Axes, trained: Trained, session: int, stretch: dict[str, Array]) -> None:
    """As units are drawn."""
    _raster(axis, trained, session, stretch)
    axis.set_ylabel("type of event (marks: events,\ncolour: predicted intensity)")


def _traces(axis: Axes, trained: Trained, session: int, stretch: dict[str, Array]) -> None:
    """The traces that the model explains best, recorded and predicted."""
    units = np.unique(stretch["source"])
    explained = [_explained(stretch, int(unit)) for unit in units]
    for row, unit in enumerate(units[np.argsort(explained)[::-1][:NUM_TRACES]]):
        time_s, truth, prediction = _series(stretch, int(unit))
        axis.plot(time_s, truth + 5 * row, color=_ink(), linewidth=0.9, label="recorded" if row == 0 else None)
        axis.plot(time_s, prediction + 5 * row, color=PREDICTED, linewidth=1.4, label="predicted" if row == 0 else None)
    axis.set_ylabel("best ROIs (standardised)")
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


def _behavior(axis: Axes, trained: Trained, session: int, stretch: dict[str, Array]) -> None:
    """An angle where there is one (cos and sin put together), else the first channel."""
    sources = trained.reader.sources(session)
    channels = dict(zip(_channels(trained, session), np.flatnonzero(sources.modality == BEHAVIOR), strict=True))
    observed = {name: int(source) for name, source in channels.items() if source in stretch["source"]}
    angles = (name.removesuffix("/cos") for name in observed if name.endswith("/cos"))
    angle = next((name for name in angles if f"{name}/sin" in observed), None)
    if angle is None:
        name, source = next(iter(observed.items()))
        time_s, truth, prediction = _series(stretch, source)
        axis.plot(time_s, truth, ".", color=_ink(), label="recorded")
        axis.plot(time_s, prediction, ".", color=PREDICTED, label="predicted")
        axis.set_ylabel(f"{name} (standardised)")
    else:
        physical = []
        for part in ("cos", "sin"):
            source = observed[f"{angle}/{part}"]
            time_s, *values = _series(stretch, source)
            physical.append([value * sources.scale[source] + sources.mean[source] for value in values])
        (cos, cos_predicted), (sin, sin_predicted) = physical
        axis.plot(time_s, np.degrees(np.arctan2(sin, cos)) % 360, ".", color=_ink(), label="recorded")
        predicted = np.degrees(np.arctan2(sin_predicted, cos_predicted)) % 360
        axis.plot(time_s, predicted, ".", color=PREDICTED, markersize=3, label="predicted")
        axis.set_ylabel(f"{angle} (degrees)")
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


def _ink() -> str:
    """What was recorded is drawn in the colour of the text, which a page may change."""
    return str(mpl.rcParams["text.color"])


def _channels(trained: Trained, session: int) -> list[str]:
    streams = token_streams(trained.store.entries[session])
    return [channel for _, stream in streams if stream["modality"] == "behavior" for channel in stream["channels"]]


def _explained(stretch: dict[str, Array], source: int) -> float:
    _, truth, prediction = _series(stretch, source)
    return 1 - float(((truth - prediction) ** 2).sum()) / max(1e-9, float((truth**2).sum()))
