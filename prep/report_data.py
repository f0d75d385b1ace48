"""What a token store says of itself, as plain data for the report: totals, sessions, coverage, audit, vocabulary.

In: a Store and its failed.jsonl. Out: a Summary of JSON-ready values, and the units of each dataset as columns.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.nwb.inventory import COLUMN_TYPES
from prep.settings import FEATURE_NAMES, MODALITIES, STREAM_FEATURES
from prep.store import FAILURES, Session, Store

NS_PER_HOUR = 3600e9
MAX_POOL = 50_000  # distinct rows of coverage, and of the audit, that a report holds: about 8 MB each
MAX_PER_SESSION = 500  # rows of coverage, and of the audit, of one session
MAX_REFUSED = 2_000
MAX_TEXT = 400  # characters of a message
MAX_STREAMS = 200  # rows of one session's table of streams
NOT_GIVEN = "not given"
UNREADABLE = (ValueError, OSError, KeyError, IndexError)  # of a damaged session: StoreError is a ValueError

Json = dict[str, Any]


@dataclass
class Pool:
    """Rows that many sessions share, each kept once; a session holds their numbers."""

    rows: list[list[Any]] = field(default_factory=list)
    _places: dict[str, int] = field(default_factory=dict)

    def add(self, rows: Iterable[Sequence[Any]]) -> tuple[list[int], int]:
        """Numbers of the rows that are kept, and how many are not for want of room."""
        numbers: list[int] = []
        num_left_out = 0
        for row in rows:
            key = json.dumps(row)
            if len(numbers) >= MAX_PER_SESSION or (key not in self._places and len(self.rows) >= MAX_POOL):
                num_left_out += 1
                continue
            if key not in self._places:
                self._places[key] = len(self.rows)
                self.rows.append(list(row))
            numbers.append(self._places[key])
        return numbers, num_left_out


@dataclass
class UnitColumns:
    """Units of one session or of many, as columns of the same length U; NaN and "" are unknown."""

    kind: list[str] = field(default_factory=list)
    region: list[str] = field(default_factory=list)
    quality: list[str] = field(default_factory=list)
    depth_um: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    rate_hz: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    skewness: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))

    def extend(self, more: "UnitColumns") -> None:
        """Add the units of another session."""
        for name in ("kind", "region", "quality"):
            getattr(self, name).extend(getattr(more, name))
        for name in ("depth_um", "rate_hz", "skewness"):
            setattr(self, name, np.concatenate([getattr(self, name), getattr(more, name)]))


@dataclass
class Summary:
    """All that the report says in words and numbers."""

    sessions: list[Json] = field(default_factory=list)  # in the order of the catalog
    coverage: Pool = field(default_factory=Pool)  # rows: object, type, becomes, reason
    findings: Pool = field(default_factory=Pool)  # rows: code, action, object, message, numbers
    coverage_types: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # type, used | skipped, reason
    codes: dict[tuple[str, str], Json] = field(default_factory=dict)
    vocabulary: dict[str, Json] = field(default_factory=dict)
    units: dict[str, UnitColumns] = field(default_factory=dict)  # by dataset
    failures: list[Json] = field(default_factory=list)
    totals: Json = field(default_factory=dict)
    datasets: list[Json] = field(default_factory=list)


def summarise(store: Store) -> Summary:
    """Read all sessions of a store, one after the other; a damaged one is listed with what is wrong with it."""
    summary = Summary(failures=read_failures(store.failures()))
    for index, entry in enumerate(store.entries):
        row = session_row(entry)
        try:
            _add_session(summary, row, store.session(index))
        except UNREADABLE as error:
            row["problem"] = clip(str(error))
        summary.sessions.append(row)
    stimulus_bytes = sum(int(entry["num_bytes"]) for entry in store.catalog["stimuli"].values())
    summary.totals = total(summary.sessions)
    summary.totals["bytes"] += stimulus_bytes
    by_dataset: dict[str, list[Json]] = {}
    for row in summary.sessions:
        by_dataset.setdefault(row["dataset"], []).append(row)
    summary.datasets = [{"dataset": name, **total(rows)} for name, rows in by_dataset.items()]
    return summary


def session_row(entry: Mapping[str, Any]) -> Json:
    """What the catalog alone says of one session."""
    streams = entry["streams"]
    extents = [(stream["start_ns"], stream["stop_ns"]) for stream in streams if stream["num_tokens"]]
    of_units = [stream for stream in streams if stream["first_unit"] is not None]
    unit_ns = sum(stream["num_tokens"] * stream["num_sources"] * stream["duration_ns"] for stream in of_units)
    return {
        "dataset": entry["dataset_id"],
        "session": entry["session_id"],
        "subject": entry["subject_id"],
        "licence": entry["licence"],
        "path": entry["path"],
        "recipe": entry["recipe_digest"][:12],
        "units": entry["num_units"],
        "hours": union_ns(extents) / NS_PER_HOUR,
        "unit_hours": unit_ns / NS_PER_HOUR,
        "tokens": sum(stream["num_tokens"] * stream["num_sources"] for stream in streams),
        "bytes": entry["num_bytes"],
        "modalities": [name for name in MODALITIES if any(stream["modality"] == name for stream in streams)],
        "streams": [stream_row(stream) for stream in streams[:MAX_STREAMS]],
        "streams_left_out": max(0, len(streams) - MAX_STREAMS),
        "splits": [[start / 1e9, stop / 1e9, label] for start, stop, label in entry["splits"]],
        "intervals": entry["intervals"],
        "refused": [[clip(row["path"]), clip(row["message"])] for row in entry["refused"]],
        "files": [[source["file"], source["bytes"]] for source in entry["sources"]],
        "coverage": [],
        "coverage_left_out": 0,
        "num_used": 0,
        "num_objects": 0,
        "findings": [],
        "findings_left_out": 0,
        "events": [],
        "pictures": [],
        "problem": "",
    }


def stream_row(stream: Mapping[str, Any]) -> Json:
    """One row of a session's table of streams."""
    return {
        "name": stream["name"],
        "kind": stream["kind"],
        "modality": stream["modality"],
        "times": stream["num_tokens"],
        "sources": stream["num_sources"],
        "rate_hz": 1e9 / stream["sample_ns"] if stream["sample_ns"] > 1 else None,  # an event is a moment: no rate
        "start_s": stream["start_ns"] / 1e9,
        "stop_s": stream["stop_ns"] / 1e9,
        "unit": stream["unit"],
    }


def union_ns(extents: Iterable[tuple[int, int]]) -> int:
    """Length of the union of intervals [start, stop)."""
    length, end = 0, None
    for start, stop in sorted(extents):
        begin = start if end is None else max(start, end)
        length += max(0, stop - begin)
        end = stop if end is None else max(end, stop)
    return length


def total(rows: Sequence[Mapping[str, Any]]) -> Json:
    """What sessions add up to."""
    sums = {name: sum(row[name] for row in rows) for name in ("units", "hours", "unit_hours", "tokens", "bytes")}
    return {
        "sessions": len(rows),
        "subjects": len({(row["dataset"], row["subject"]) for row in rows if row["subject"]}),
        **sums,
        "modalities": [name for name in MODALITIES if any(name in row["modalities"] for row in rows)],
        "licences": sorted(Counter(row["licence"] or NOT_GIVEN for row in rows).items()),
        "refused": sum(len(row["refused"]) for row in rows),
        "findings": sum(len(row["findings"]) + row["findings_left_out"] for row in rows),
    }


def read_failures(text: str) -> list[Json]:
    """Files that the last ingest did not take: file, state, object, error."""
    rows = []
    for line in text.splitlines()[:MAX_REFUSED]:
        try:
            row = json.loads(line)
            rows.append({name: clip(str(row.get(name, ""))) for name in ("file", "state", "object", "error")})
        except (ValueError, AttributeError):
            rows.append({"file": "", "state": "unreadable line", "object": FAILURES, "error": clip(line)})
    return rows


# ---------------------------------------------------------------- one session


def _add_session(summary: Summary, row: Json, session: Session) -> None:
    attributes = session.attributes
    coverage, findings = attributes["coverage"], attributes["findings"]
    row["num_objects"] = len(coverage)
    row["num_used"] = sum(found["used_as"] is not None for found in coverage)
    row["coverage"], row["coverage_left_out"] = summary.coverage.add(fold_columns(coverage))
    row["findings"], row["findings_left_out"] = summary.findings.add(map(finding_row, findings))
    for found in coverage:
        if found["neurodata_type"] not in COLUMN_TYPES:
            state = "skipped" if found["used_as"] is None else "used"
            summary.coverage_types[found["neurodata_type"], state, clip(found["reason"])] += 1
    _count_codes(summary.codes, findings)
    row["events"] = list(_count_events(session))
    for name, modality, count in row["events"]:
        word = summary.vocabulary.setdefault(name, {"type": name, "modality": modality, "events": 0, "sessions": 0})
        word["events"] += count
        word["sessions"] += 1
    summary.units.setdefault(row["dataset"], UnitColumns()).extend(unit_columns(session))


def fold_columns(coverage: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Rows (object, type, becomes, reason); the columns of a table are one row for each thing that became of them."""
    rows, columns = [], Counter[tuple[str, str, str]]()
    for found in coverage:
        becomes, reason = found["used_as"] or "skipped", clip(found["reason"])
        if found["neurodata_type"] in COLUMN_TYPES:
            columns[found["path"].rsplit("/", 1)[0], becomes, reason] += 1
        else:
            rows.append((found["path"], found["neurodata_type"], becomes, reason))
    for (path, becomes, reason), count in columns.items():
        rows.append((f"{path}/*", "1 column" if count == 1 else f"{count} columns", becomes, reason))
    return sorted(rows)


def finding_row(finding: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    """A row of the audit table: code, action, object, message, numbers."""
    numbers = ", ".join(f"{name} {_number(value)}" for name, value in finding["numbers"].items())
    return finding["code"], finding["action"], finding["path"], clip(finding["message"]), clip(numbers)


def _number(value: float | Sequence[float]) -> str:
    """A measured number, or how many there are and between which values they lie."""
    if isinstance(value, int | float):
        return f"{value:.6g}"
    return f"{len(value)} values, {min(value):.4g} to {max(value):.4g}" if value else "no values"


def _count_codes(codes: dict[tuple[str, str], Json], findings: Sequence[Mapping[str, Any]]) -> None:
    counted = Counter((finding["code"], finding["action"]) for finding in findings)
    for (code, action), count in counted.items():
        example = next(f["message"] for f in findings if (f["code"], f["action"]) == (code, action))
        blank = {"code": code, "action": action, "findings": 0, "sessions": 0, "example": clip(example)}
        row = codes.setdefault((code, action), blank)
        row["findings"] += count
        row["sessions"] += 1


def _count_events(session: Session) -> Iterator[tuple[str, str, int]]:
    """(type, modality, number of events) of a session, by type; a type of two streams is counted as one."""
    counts: Counter[str] = Counter()
    modality: dict[str, str] = {}
    for entry in session.entry["streams"]:
        if entry["kind"] == "event":
            stream = session.stream(entry["name"])
            types, numbers = np.unique(np.asarray(stream.types), return_counts=True)
            for code, number in zip(types.tolist(), numbers.tolist(), strict=True):
                counts[stream.spec.types[code]] += number
                modality[stream.spec.types[code]] = entry["modality"]
    return ((name, modality[name], count) for name, count in sorted(counts.items()))


def unit_columns(session: Session) -> UnitColumns:
    """The units of a session; rates and skewness are those of the train split, NaN where nothing was observed."""
    features = np.asarray(session.array("units/features"), np.float32)
    kind = session.text("units/kind")
    rate, skewness = (features[:, FEATURE_NAMES.index(name)] for name in ("log_rate", "skewness"))
    is_observed = (features[:, [FEATURE_NAMES.index(name) for name in STREAM_FEATURES]] != 0).any(axis=1)
    is_sorted = np.array([name == "unit" for name in kind], bool)
    return UnitColumns(
        kind=kind,
        region=session.text("units/region"),
        quality=session.text("units/quality"),
        depth_um=np.asarray(session.array("units/depth_um"), np.float32),
        rate_hz=np.where(is_observed & is_sorted, np.maximum(np.exp(rate) - 0.01, 0), np.nan).astype(np.float32),
        skewness=np.where(is_observed & ~is_sorted, skewness, np.nan).astype(np.float32),
    )


def clip(text: str) -> str:
    """A text of at most MAX_TEXT characters."""
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"
