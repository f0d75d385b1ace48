"""Hand-built session plans for tests of the store and of ingest: no NWB, small, and the same from the same number.

In: a number, or the path of a little text file that stands for a recording. Out: SessionPlan.
"""

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prep import catalog
from prep.frames import num_stimulus_shards
from prep.plan import (
    Finding,
    Found,
    IntervalTable,
    PlannedStimulus,
    PlannedStream,
    PrepError,
    SessionPlan,
    Units,
)
from prep.settings import EVENT_FIELDS, NO_TIME
from prep.shards import Array
from prep.store import FILLS, StreamSpec
from prep.write_session import (
    Target,
    check,
    finish_session,
    finish_stimulus,
    runs_of_shards,
    session_folder,
    source_of,
    write_stimulus_shards,
    write_stream_shards,
)

SECOND_NS = 1_000_000_000
FOR_EVER_S = 10_000.0
FRAMES_SHAPE = (7, 4, 3)
RECIPE_DIGEST = "0" * 64


class SmallShards(StreamSpec):
    """A stream whose shards hold two chunks, so that a small store has several."""

    @property
    def shard_tokens(self) -> int:
        return 2 * self.chunk_tokens


@dataclass(frozen=True)
class Values:
    """Reads tokens that a formula gives: value = f(token, source, sample), by integer hashing, so the same anywhere."""

    kind: str
    shape: tuple[int, int, int]
    seed: int
    slow_s: float = 0.0
    missing_shard: tuple[int, int] = (0, 0)
    broken_at: int = -1
    deadly_at: int = -1

    def read(self, start: int, stop: int) -> Array:
        time.sleep(self.slow_s)
        if start <= self.broken_at < stop:
            raise OSError("the disk is on fire")
        if start <= self.deadly_at < stop:
            os._exit(1)  # as the kernel's out-of-memory killer would
        return self.all()[start:stop]

    def all(self) -> Array:
        """Every token (K, S, P)."""
        number = np.arange(int(np.prod(self.shape)), dtype=np.uint64).reshape(self.shape)
        mixed = (number + np.uint64(self.seed)) * np.uint64(0x9E3779B97F4A7C15)
        level = ((mixed >> np.uint64(40)) % np.uint64(1000)).astype(np.int64)  # 0..999
        missing = level % 97 == 0
        if self.kind == "counts":
            values = np.where(missing, FILLS["counts"], level // 200).astype(np.uint8)
        elif self.kind == "frames":
            values = np.where(missing, -1, level % FRAMES_SHAPE[0]).astype(np.int32)
        else:
            values = np.where(missing, np.nan, level / 64 - 3).astype(np.float32)
        values[slice(*self.missing_shard)] = FILLS[self.kind]
        return values


@dataclass(frozen=True)
class Pixels:
    """Reads frames that a formula gives."""

    shape: tuple[int, ...] = FRAMES_SHAPE

    def read(self, start: int, stop: int) -> Array:
        return (np.arange(int(np.prod(self.shape))) * 37 % 251).astype(np.uint8).reshape(self.shape)[start:stop]


def a_recording(folder: Path) -> Path:
    """A file that stands for a recording."""
    path = folder / "recording.nwb"
    path.write_text("a recording")
    return path


def stream(
    name: str, kind: str, modality: str, shape: tuple[int, int, int], seed: int = 1, **more: Any
) -> PlannedStream:
    """A stream of `shape` (K, S, P) in small shards; `more`: fields of Values, of StreamSpec, offset_ns."""
    of_values = {key: more.pop(key) for key in ("slow_s", "missing_shard", "broken_at", "deadly_at") if key in more}
    offset_ns, types = more.pop("offset_ns", None), more.pop("types_of", None)
    step_ns = 100_000_000
    duration_ns = 1 if kind == "event" else step_ns
    spec = SmallShards(
        name=name,
        kind=kind,
        modality=modality,
        num_tokens=shape[0],
        num_sources=shape[1],
        samples_per_token=shape[2],
        duration_ns=duration_ns,
        sample_ns=max(1, duration_ns // shape[2]),
        **more,
    )
    start_ns = 12_000_000 * SECOND_NS + np.arange(shape[0], dtype=np.int64) * step_ns
    reader = Values(kind, shape, seed, **of_values)
    return PlannedStream(spec=spec, start_ns=start_ns, reader=reader, offset_ns=offset_ns, types=types)


def session(source: Path, session_id: str, seed: int = 1, dataset_id: str = "d1", **more: Any) -> SessionPlan:
    """A session with spikes, traces with offsets, running and a stimulus; 13 s. `more`: of the spikes' Values."""
    origin = 12_000_000 * SECOND_NS
    frames = Pixels()
    digest = hashlib.sha256(frames.read(0, FRAMES_SHAPE[0]).tobytes()).hexdigest()[:16]
    streams = (
        stream("spikes", "counts", "spikes", (130, 3, 5), seed, first_unit=0, origin="/units", **more),
        stream(
            "roi",
            "trace",
            "traces",
            (125, 2, 3),
            seed + 1,
            first_unit=3,
            missing_shard=(40, 80),
            offset_ns=np.array([0, 7_000_000], np.int64),
        ),
        stream("running", "trace", "behavior", (125, 1, 1), seed + 2, channels=("speed",), unit="cm/s"),
        stream("movie", "frames", "stimulus", (60, 1, 1), seed + 3, channels=("screen",), stimulus=digest),
        stream(
            "licks",
            "event",
            "behavior",
            (9, 1, 2),
            seed + 4,
            channels=("licks",),
            fields=EVENT_FIELDS,
            types=("lick_left", "lick_right"),
            types_of=np.arange(9, dtype=np.int32) % 2,
        ),
    )
    units = Units(
        unit_key=[f"{dataset_id}/{session_id}/{number}" for number in range(5)],
        kind=["unit"] * 3 + ["roi"] * 2,
        region=["CA1", "", "V1", "V1", "sübiculum"],
        quality=["good"] * 5,
        xyz_um=np.array([[1, 2, 3]] * 4 + [[np.nan] * 3], np.float32),
    )
    trials = IntervalTable(
        start_ns=origin + np.array([0, 2, 5]) * SECOND_NS,
        stop_ns=np.array([origin + SECOND_NS, origin + 3 * SECOND_NS, NO_TIME]),
        columns={"contrast": np.array([0.5, np.nan, 1.0]), "phase": ["go", "", "no go"]},
    )
    return SessionPlan(
        dataset_id=dataset_id,
        session_id=session_id,
        subject_id="mouse-1",
        source=source,
        licence="CC-BY-4.0",
        units=units,
        streams=streams,
        stimuli=(PlannedStimulus(digest=digest, shape=FRAMES_SHAPE, reader=frames),),
        intervals={"trials": trials},
        splits=(
            (origin, origin + 8 * SECOND_NS, "train"),
            (origin + 9 * SECOND_NS, origin + 10 * SECOND_NS, "valid"),
            (origin + 11 * SECOND_NS, origin + 13 * SECOND_NS, "test"),
        ),
        coverage=(Found(path="/units", neurodata_type="Units", used_as="spikes"),),
        findings=(Finding(code="gaps", path="/units", action="noted", message="none"),),
    )


@dataclass(frozen=True)
class FakeRecipe:
    """What ingest asks of a recipe."""

    text: str = ""
    dataset_id: str | None = None

    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def fake_planner(paths: Sequence[Path], recipe: Any, dataset_id: str) -> SessionPlan:
    """Plans a file of words `session=… seed=… slow_s=… broken_at=…`; `refuse=why` refuses it, `lost=why` an object.

    `hangs=1` is a file of a disk that does not answer.
    """
    path = paths[0]
    words = dict(word.split("=", 1) for word in path.read_text().split())
    time.sleep(FOR_EVER_S if "hangs" in words else 0.0)
    if "refuse" in words:
        raise PrepError(words["refuse"].replace("_", " "))
    more = {
        key: kind(words[key])
        for key, kind in (("slow_s", float), ("broken_at", int), ("deadly_at", int))
        if key in words
    }
    plan = session(path, words["session"], int(words.get("seed", 1)), dataset_id, **more)
    if "lost" in words:
        told = words["lost"].replace("_", " ")
        lost = Finding(code="broken-object", path="/acquisition/lick", action="refused", message=told)
        plan = replace(plan, findings=(*plan.findings, lost))
    return plan


def target(root: Path, plan: SessionPlan, recipe_digest: str = RECIPE_DIGEST) -> Target:
    """Where the store at `root` keeps a hand-built session."""
    folder = session_folder(plan.dataset_id, plan.session_id)
    return Target(root=root, folder=folder, run="test", sources=(source_of(plan.source),), recipe_digest=recipe_digest)


def write_plan(plan: SessionPlan, target: Target) -> dict[str, Any]:
    """One session from plan to seal in this process: what ingest spreads over workers, byte for byte."""
    check(plan)
    for stimulus in plan.stimuli:
        for first, stop in runs_of_shards(stimulus.reader, num_stimulus_shards(stimulus)):
            write_stimulus_shards(target.root, target.run, stimulus, first, stop)
        finish_stimulus(target.root, target.run, stimulus)
    for number, planned in enumerate(plan.streams):
        for first, stop in runs_of_shards(planned.reader, planned.spec.num_shards):
            write_stream_shards(plan, target, number, first, stop)
    return finish_session(plan, target)


def build_store(root: Path, recording: Path, *session_ids: str) -> None:
    """A store of hand-built sessions, written in this process."""
    for number, session_id in enumerate(session_ids):
        plan = session(recording, session_id, seed=1 + 10 * number)
        write_plan(plan, target(root, plan))
    catalog.write(root)


def tree(root: Path) -> dict[str, str]:
    """Every file of a store with its digest, but for what only tells about runs."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in (".lock", "failed.jsonl")
    }


def read_bytes_of(root: Path) -> bytes:
    """All bytes of a store, one file after the other."""
    return b"".join(path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file())
