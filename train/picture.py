"""A picture of what the model predicts beside what was recorded, on a stretch that it has not seen.

In: a trained model and its store. Out: one PNG: head direction or other behaviour, a raster with rates, traces.
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from train.dataset import split_windows
from train.evaluate import suits
from train.masking import TASKS, Task, task_mask
from train.sources import token_streams
from train.trained import Trained

Array = npt.NDArray[Any]
NUM_WINDOWS = 20
NUM_UNITS = 40
NUM_TRACES = 5


def draw(trained: Trained, label: str, path: Path) -> None:
    """Draw one panel pair per kind of prediction that the store allows."""
    panels = [(task, session) for task in _shown_tasks() if (session := _session(trained, task)) is not None]
    figure, axes = plt.subplots(len(panels), 1, figsize=(11, 3.2 * len(panels)), squeeze=False, layout="constrained")
    for axis, (task, session) in zip(axes[:, 0], panels, strict=True):
        stretch = _predict(trained, label, task, session)
        entry = trained.store.entries[session]
        panel = {"spikes": _raster, "traces": _traces, "behavior": _behavior}[task.modality]
        panel(axis, trained, session, stretch)
        seen = " + ".join(task.visible)
        axis.set_title(
            f"{task.modality}: {task.family.replace('_', '-')} from {seen}   ({entry['session_id']}, {label})"
        )
        axis.set_xlabel("time in the split (s)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _shown_tasks() -> list[Task]:
    """Decoding, then encoding from all there is; spikes before traces."""
    order = {"decoding": 0, "encoding": 1}
    shown = [task for task in TASKS if task.family in order and task.visible != ("behavior",)]
    best: dict[str, Task] = {}
    for task in sorted(shown, key=lambda task: (order[task.family], -len(task.visible))):
        best.setdefault(task.modality, task)
    return list(best.values())


def _session(trained: Trained, task: Task) -> int | None:
    return next((i for i, entry in enumerate(trained.store.entries) if suits(task, entry)), None)


def _predict(trained: Trained, label: str, task: Task, session: int) -> dict[str, Array]:
    """Samples of a run of neighbouring windows: time (n,), source (n,), truth (n,), prediction (n,), null (n,)."""
    context_s = trained.run.data.context_s
    windows = split_windows(trained.store, label, context_s, context_s)
    starts = [windows.locate(i)[1] for i in range(len(windows)) if windows.locate(i)[0] == session][:NUM_WINDOWS]
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
    rates = np.stack([_series(stretch, int(unit))[2] for unit in units])
    shade = (rates - rates.min(1, keepdims=True)) / np.maximum(np.ptp(rates, axis=1, keepdims=True), 1e-9)
    stop_s = float(stretch["time_s"].max()) + 0.02
    axis.imshow(shade, aspect="auto", origin="lower", cmap="Oranges", extent=(0, stop_s, -0.5, len(units) - 0.5))
    for row, unit in enumerate(units):
        time_s, counts, _ = _series(stretch, int(unit))
        axis.plot(time_s[counts > 0], np.full(int((counts > 0).sum()), row), "k|", markersize=3.5, markeredgewidth=0.7)
    axis.set_ylabel("unit (dots: spikes,\ncolour: predicted rate)")


def _traces(axis: Axes, trained: Trained, session: int, stretch: dict[str, Array]) -> None:
    """The traces that the model explains best, recorded and predicted."""
    units = np.unique(stretch["source"])
    explained = [_explained(stretch, int(unit)) for unit in units]
    for row, unit in enumerate(units[np.argsort(explained)[::-1][:NUM_TRACES]]):
        time_s, truth, prediction = _series(stretch, int(unit))
        axis.plot(time_s, truth + 5 * row, color="0.35", linewidth=0.9, label="recorded" if row == 0 else None)
        axis.plot(time_s, prediction + 5 * row, color="C1", linewidth=1.4, label="predicted" if row == 0 else None)
    axis.set_ylabel("best ROIs (standardised)")
    axis.legend(loc="upper right")


def _behavior(axis: Axes, trained: Trained, session: int, stretch: dict[str, Array]) -> None:
    """An angle where there is one (cos and sin put together), else the first channel."""
    channels = _channels(trained, session)
    sources = trained.reader.sources(session)
    place = {name: i for i, name in enumerate(channels)}
    angle = next((name[: -len("/cos")] for name in channels if name.endswith("/cos")), None)
    order = np.unique(stretch["source"])
    if angle is None:
        time_s, truth, prediction = _series(stretch, int(order[0]))
        axis.plot(time_s, truth, ".", color="0.35", label="recorded")
        axis.plot(time_s, prediction, ".", color="C1", label="predicted")
        axis.set_ylabel(f"{channels[0]} (standardised)")
    else:
        physical = []
        for part in ("cos", "sin"):
            source = int(order[place[f"{angle}/{part}"]])
            time_s, *values = _series(stretch, source)
            physical.append([value * sources.scale[source] + sources.mean[source] for value in values])
        (cos, cos_predicted), (sin, sin_predicted) = physical
        axis.plot(time_s, np.degrees(np.arctan2(sin, cos)) % 360, ".", color="0.35", label="recorded")
        predicted = np.degrees(np.arctan2(sin_predicted, cos_predicted)) % 360
        axis.plot(time_s, predicted, ".", color="C1", markersize=3, label="predicted")
        axis.set_ylabel(f"{angle} (degrees)")
    axis.legend(loc="upper right")


def _channels(trained: Trained, session: int) -> list[str]:
    streams = token_streams(trained.store.entries[session])
    return [channel for _, stream in streams if stream["modality"] == "behavior" for channel in stream["channels"]]


def _explained(stretch: dict[str, Array], source: int) -> float:
    _, truth, prediction = _series(stretch, source)
    return 1 - float(((truth - prediction) ** 2).sum()) / max(1e-9, float((truth**2).sum()))
