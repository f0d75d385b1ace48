"""Held-out evaluation: what the trained model explains of recordings it has not seen, per modality and task.

In: a run's newest checkpoint, its store, and (for a synthetic brain) references: the best possible predictions.
Out: one row per task with deviance explained, ceiling and their ratio; and the predictions behind every row.
"""

import argparse
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from train.dataset import Sources, Window, Windows, split_windows
from train.event_counts import as_read
from train.masking import TASKS, Mask, Task, task_mask
from train.metrics import deviance_explained
from train.modalities import COUNTED
from train.model.processing_brainloom import has_scale
from train.trained import Trained, load_trained

Array = npt.NDArray[Any]
BATCH = 4


@dataclass
class Row:
    """One task on one set of streams, sample by sample: n observed samples."""

    task: Task
    has_ceiling: bool
    ceiling_kind: str = "null"
    parts: list[dict[str, Array]] = field(default_factory=list)
    streams: set[str] = field(default_factory=set)

    def column(self, name: str) -> Array:
        """One column over all parts (n,)."""
        return np.concatenate([part[name] for part in self.parts])

    def summary(self) -> dict[str, Any]:
        """The row as summary.json shows it."""
        modality, truth, null = self.task.modality, self.column("truth"), self.column("null")
        explained = deviance_explained(modality, truth, self.column("prediction"), null)
        ceiling = deviance_explained(modality, truth, self.column("reference"), null) if self.has_ceiling else None
        return {
            "modality": modality,
            "task": self.task.family,
            "visible": list(self.task.visible),
            "streams": sorted(self.streams),
            "num_values": len(truth),
            "deviance_explained": explained
            if math.isfinite(explained)
            else None,  # a null that is right leaves nothing
            "ceiling": ceiling if ceiling is not None and math.isfinite(ceiling) else None,
            "ceiling_kind": self.ceiling_kind,
            "fraction_of_ceiling": explained / ceiling if ceiling and math.isfinite(explained / ceiling) else None,
        }


class References:
    """Best possible predictions by stream and time, as prep's synthetic brain writes them: <session_id>.npz."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._rows: dict[str, list[dict[str, Any]]] = {}

    def find(self, session_id: str, stream: str, task: Task) -> dict[str, Any] | None:
        """The reference for a task on a stream, with `start_ns` (n,) and `values` (n, S)."""
        for row in self._load(session_id):
            same = (row["stream"], row["task"], sorted(row["visible"])) == (stream, task.family, sorted(task.visible))
            if same and row["modality"] == task.modality:
                return row
        return None

    def _load(self, session_id: str) -> list[dict[str, Any]]:
        if session_id not in self._rows:
            path = self._folder / f"{session_id}.npz" if self._folder else None
            self._rows[session_id] = []
            if path is not None and path.exists():
                with np.load(path) as file:
                    index = json.loads(str(file["index"]))
                    self._rows[session_id] = [
                        {**row, "start_ns": file[row["start_ns"]], "values": file[row["values"]]} for row in index
                    ]
        return self._rows[session_id]


def suits(task: Task, entry: dict[str, Any]) -> bool:
    """Does a session have what a task asks and sees? The stimulus alone is seen only where there is no behaviour."""
    seen, asked = ({stream["modality"] for stream in streams} for streams in (entry["streams"], _as_read(entry)))
    alone = task.visible == ("stimulus",) and "behavior" in seen
    return task.modality in asked and set(task.visible) <= seen and not alone


def _as_read(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [as_read(stream) for stream in entry["streams"]]


def spread(trained: Trained, label: str, session: int, num_windows: int) -> list[int]:
    """Starts (ns) of up to `num_windows` windows of a session's split, evenly spread, none overlapping."""
    context_s = trained.run.data.context_s
    return spread_windows(split_windows(trained.store, label, context_s, context_s), session, num_windows)


def spread_windows(windows: Windows, session: int, num_windows: int) -> list[int]:
    """Starts (ns) of up to `num_windows` windows of a session, evenly spread."""
    own = windows.of_sessions().get(session, range(0))
    chosen = np.linspace(0, len(own) - 1, min(num_windows, len(own))).round().astype(int)
    return [windows.locate(own[i])[1] for i in chosen]


def evaluate(trained: Trained, label: str, references: References, num_windows: int) -> list[Row]:
    """All rows of all tasks that the store allows."""
    rows: dict[tuple[Task, bool], Row] = {}
    for session, entry in enumerate(trained.store.entries):
        starts = spread(trained, label, session, num_windows)
        context_ns = round(trained.run.data.context_s * 1e9)
        windows = [trained.reader.read(session, start, context_ns) for start in starts]
        unknown = num_without_scale(trained.reader.sources(session))
        if windows and unknown:
            print(
                f"{entry['dataset_id']}/{entry['session_id']}: the train split has nothing, or zeros alone, of "
                f"{unknown} sources of traces or behavior. Without a scale they count as missing: give it more of them."
            )
        for task in TASKS:
            if not suits(task, entry):
                continue
            masks = [task_mask(task, window.tokens, trained.run.data.context_s) for window in windows]
            for begin in range(0, len(windows), BATCH):
                chosen = slice(begin, begin + BATCH)
                predictions = trained.predict(windows[chosen], masks[chosen])
                for window, mask, prediction in zip(windows[chosen], masks[chosen], predictions, strict=True):
                    _add(rows, task, entry, references, (window, mask, prediction))
    return [row for row in rows.values() if row.parts]


def num_without_scale(sources: Sources) -> int:
    """Sources whose values count as missing; origins have none."""
    return int((~has_scale(sources.mean, sources.scale) & (sources.stream >= 0)).sum())


def _add(
    rows: dict[tuple[Task, bool], Row],
    task: Task,
    entry: dict[str, Any],
    references: References,
    result: tuple[Window, Mask, Array],
) -> None:
    window, mask, prediction = result
    asked = np.flatnonzero(mask.asked)
    stream_of = window.sources.stream[window.tokens.source[asked]]
    for number in np.unique(stream_of):
        stream = as_read(entry["streams"][number])
        reference = references.find(entry["session_id"], stream["name"], task)
        own = stream_of == number
        part = _columns(window, asked[own], prediction[own], stream, reference)
        if not len(part["truth"]):
            continue
        row = rows.setdefault((task, reference is not None), Row(task, reference is not None))
        row.ceiling_kind = reference["ceiling_kind"] if reference else "null"
        row.streams.add(stream["name"])
        row.parts.append(part)


def _columns(
    window: Window, asked: Array, prediction: Array, stream: dict[str, Any], reference: dict[str, Any] | None
) -> dict[str, Array]:
    """Flatten (tokens, P) into observed samples (n,)."""
    num_samples = stream["samples_per_token"]
    source = window.tokens.source[asked]
    observed = window.observed[asked, :num_samples]
    sample_ns = window.token_ns[asked][:, None] + np.arange(num_samples) * stream["sample_ns"]
    null = window.sources.mean[source] if stream["modality"] in COUNTED else np.zeros(len(source), np.float32)
    columns = {
        "truth": window.labels[asked, :num_samples],
        "prediction": prediction[:, :num_samples],
        "null": np.repeat(null[:, None], num_samples, axis=1),
        "time_ns": sample_ns,
        "source": np.repeat(window.sources.place[source][:, None], num_samples, axis=1),
        "session": np.full(sample_ns.shape, window.session),
        "stream": np.full(sample_ns.shape, window.sources.stream[source][:, None]),
    }
    if reference is not None:
        expected = _at(reference, sample_ns, columns["source"], stream["sample_ns"])
        if stream["modality"] not in COUNTED:
            expected = (expected - window.sources.mean[source][:, None]) / window.sources.scale[source][:, None]
        columns["reference"] = expected.astype(np.float32)
        observed = observed & np.isfinite(expected)
    return {name: column[observed] for name, column in columns.items()}


def _at(reference: dict[str, Any], time_ns: Array, place: Array, sample_ns: int) -> Array:
    """The reference's values at times (…) of sources (…); NaN for a sample that it does not have."""
    known = reference["start_ns"]
    after = np.clip(np.searchsorted(known, time_ns), 1, len(known) - 1)
    nearest = after - (time_ns - known[after - 1] < known[after] - time_ns)
    far = np.abs(known[nearest] - time_ns) > sample_ns // 2
    values: Array = np.where(far, np.nan, reference["values"][nearest, place])
    return values


def save_predictions(path: Path, rows: list[Row]) -> None:
    """`truth_i`, `prediction_i`, `null_i` (and `reference_i`) of row number i."""
    names = ("truth", "prediction", "null", "reference")
    arrays = {
        f"{name}_{i}": row.column(name).astype(np.float32)
        for i, row in enumerate(rows)
        for name in names
        if name in row.parts[0]
    }
    np.savez_compressed(path, allow_pickle=False, **arrays)


def table(summaries: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [
        f"{'modality':<9} {'task':<13} {'visible':<18} {'explained':>9} {'ceiling':>8} {'share':>6}  kind   streams"
    ]
    for row in summaries:
        explained, ceiling = ("-" if row[of] is None else f"{row[of]:.3f}" for of in ("deviance_explained", "ceiling"))
        share = "-" if row["fraction_of_ceiling"] is None else f"{row['fraction_of_ceiling']:.0%}"
        lines.append(
            f"{row['modality']:<9} {row['task']:<13} {'+'.join(row['visible']):<18} {explained:>9} "
            f"{ceiling:>8} {share:>6}  {row['ceiling_kind']:<6} {', '.join(row['streams'])}"
        )
    return "\n".join(lines)


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m train eval`."""
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--split", choices=["valid", "test"], default="valid")
    parser.add_argument("--references", type=Path, help="folder of a synthetic brain's best possible predictions")
    parser.add_argument("--windows", type=int, default=20, help="windows per session, evenly spread")
    parser.add_argument("--out", type=Path, help="folder for evaluation.json, predictions.npz (default: the run's)")


def main(args: argparse.Namespace) -> int:
    """Evaluate, print and save."""
    trained = load_trained(args.run_dir)
    rows = evaluate(trained, args.split, References(args.references), args.windows)
    out = args.out or args.run_dir
    summaries = [row.summary() for row in rows]
    (out / "evaluation.json").write_text(json.dumps({"split": args.split, "tasks": summaries}, indent=1))
    save_predictions(out / "predictions.npz", rows)
    print(table(summaries))
    return 0
