"""The synthetic brain: how much of what can be known the model finds, for units it has seen and for units it has not.

In: a seed. Out: rows of (model, who is asked, task): deviance explained as a fraction of the ceiling (prep/ceiling.py),
the linear baseline of the same sessions beside it.

Who is asked: `seen` units of the training sessions, in their test split; `unseen units` of the same sessions, which
training never saw; `unseen subjects`, whose brain and movie come from another seed. The last two have no row in the
unit table: it is inferred from their train split, a support segment, or then fitted. No store holds any ground truth.
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench.science import linear, results
from bench.science.brainloom import ROOT, call

from prep.brain_draw import Kind, SessionSpec
from prep.ceiling import save_references
from prep.store import Store
from prep.synthetic import Session, references, synthesize, write_session
from train import config, evaluate
from train.metrics import deviances
from train.trained import load_trained

TRAIN_SEED, NEW_SEED = 0, 1000
RUN = ROOT / "train" / "configs" / "synthetic.yaml"
NUM_SEEN = 80  # of a spike session's units; the others are never trained on
NUM_WINDOWS = 60  # per session
NUM_RESAMPLES = 1000
FIT_STEPS = 200
SCALING_STEPS = 400
LONG_S, NEW_S = 1800.0, 600.0
SIZES = {"64": (64, 168), "128": (128, 344), "192": (192, 512)}  # width: (hidden_size, intermediate_size)
AMOUNTS_S = (300.0, 900.0, LONG_S)
SHOWN = ("encoding", "decoding", "co_smoothing")
DATASET = "synthetic"


def spec(number: int, subject: str, kind: Kind, duration_s: float) -> SessionSpec:
    """One session of 100 units."""
    return SessionSpec(
        session_id=f"s{number:02d}",
        subject_id=subject,
        kind=kind,
        num_units=100,
        duration_s=duration_s,
        start_s=8.3 * number,
        seed=number,
    )


KINDS: tuple[Kind, ...] = ("spikes", "spikes", "spikes", "spikes", "traces", "traces")
TRAINED: tuple[tuple[int, Kind], ...] = tuple(enumerate(KINDS, 1))
NEW: tuple[tuple[int, Kind], ...] = ((11, "spikes"), (12, "spikes"), (13, "traces"))


@dataclass(frozen=True)
class Brain:
    """Stores and truths of one amount of data."""

    folder: Path

    @property
    def seen(self) -> Path:
        """What is trained on."""
        return self.folder / "seen"

    @property
    def whole(self) -> Path:
        """The same sessions with all their units."""
        return self.folder / "whole"

    @property
    def new(self) -> Path:
        """Other subjects."""
        return self.folder / "new"


def make(folder: Path, duration_s: float, with_others: bool) -> Brain:
    """Write recordings, truths and stores; what is sealed is not made again."""
    brain = Brain(folder)
    parts = [(brain.seen, TRAINED, TRAIN_SEED, duration_s, True)]
    if with_others:
        parts += [(brain.whole, TRAINED[:4], TRAIN_SEED, duration_s, False), (brain.new, NEW, NEW_SEED, NEW_S, False)]
    for part, sessions, seed, length_s, cut in parts:
        if (part / "store" / "catalog.json").exists():
            continue
        for number, kind in sessions:
            subject = f"loom{number:02d}" if seed == TRAIN_SEED else f"other{number:02d}"
            session = synthesize(spec(number, subject, kind, length_s), seed)
            write_session(without_last(session) if cut else session, part / "nwb", None)
            save_references(part / "truth" / f"{session.spec.session_id}.npz", references(session))
        call("prep", "ingest", part / "nwb", "--out", part / "store", "--dataset", DATASET, "--workers", "2")
    return brain


def without_last(session: Session) -> Session:
    """The recording without the units that are kept from training; unit keys stay as they are."""
    if not isinstance(session.recorded, list):
        return session
    return replace(session, recorded=session.recorded[:NUM_SEEN])


def train(store: Path, folder: Path, *overrides: str) -> float:
    """Train and export as a user would; returns minutes. A hub folder that is there is not made again.

    Graphs are compiled anew, as on a machine that has never trained: a quarter of the minutes.
    """
    done = folder / "seconds.json"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        call("train", "hostfile", "--nodes", "localhost", "--slots", "2", "--out", folder / "hostfile")
        began_s = time.perf_counter()
        more = ("--store", store, "--out", folder / "run", "--hostfile", folder / "hostfile")
        call("train", "train", "--config", RUN, *more, *overrides, TORCHINDUCTOR_CACHE_DIR=str(folder / "graphs"))
        seconds = time.perf_counter() - began_s
        call("train", "export", folder / "run", "--hub", folder / "hub")
        done.write_text(json.dumps(seconds))
    return float(json.loads(done.read_text())) / 60


def adapted(hub: Path, store: Path, out: Path, steps: int) -> Path:
    """Identities for another store."""
    if not (out / "adapt.json").exists():
        call("train", "adapt", "--hub", hub, "--store", store, "--out", out, "--steps", str(steps))
    return out


class WithCeiling(evaluate.References):
    """References of what has a ceiling: nobody has worked out the pupil's."""

    def find(self, session_id: str, stream: str, task: Any) -> dict[str, Any] | None:
        """As References, without the pupil."""
        return None if stream == "pupil_diameter" else super().find(session_id, stream, task)


Found = dict[tuple[str, str, str], dict[str, Any]]


def score_beside_linear(run: Path, part: Path, only: np.ndarray | None = None) -> Found:
    """As `score`, with what the linear baseline of the same sessions explains."""
    linear.write(Store(part / "store"), part / "linear")
    return score(run, part, only, {"ceiling": part / "truth", "linear": part / "linear"})


def score(run: Path, part: Path, only: np.ndarray | None = None, references: dict[str, Path] | None = None) -> Found:
    """{(modality, task, visible): figures} on the test split; `only` keeps some places of the spike stream."""
    trained = load_trained(run)
    found: Found = {}
    for name, folder in (references or {"ceiling": part / "truth"}).items():
        rows = evaluate.evaluate(trained, "test", WithCeiling(folder), NUM_WINDOWS)
        for row in rows:
            if row.task.family not in SHOWN or not row.has_ceiling:
                continue
            if only is not None:
                row.parts = [part for each in row.parts if len((part := kept(each, only))["truth"])]
            if not row.parts:
                continue
            figures = row.summary()
            key = (figures["modality"], figures["task"], "+".join(figures["visible"]))
            found.setdefault(key, {})["model"] = figures["deviance_explained"]
            found[key][name] = figures["ceiling"]
            if name == "linear":
                found[key]["ahead"] = ahead(row)
    return found


def ahead(row: evaluate.Row) -> tuple[float, float]:
    """By how much more the model explains than the reference: an interval of 95 %, over resampled windows."""
    columns = ("prediction", "reference", "null")
    sums = [[deviances(row.task.modality, part["truth"], part[name]).sum() for name in columns] for part in row.parts]
    model, other, null = np.array(sums).T
    drawn = np.random.default_rng(0).integers(len(null), size=(NUM_RESAMPLES, len(null)))
    low, high = np.percentile((other - model)[drawn].sum(1) / null[drawn].sum(1), (2.5, 97.5))
    return float(low), float(high)


def kept(part: dict[str, np.ndarray], only: np.ndarray) -> dict[str, np.ndarray]:
    """Samples of some sources."""
    own = np.isin(part["source"], only)
    return {name: column[own] for name, column in part.items()}


SCALING_TASKS = (
    ("spikes", "encoding", "behavior+stimulus"),
    ("traces", "encoding", "behavior+stimulus"),
    ("behavior", "decoding", "spikes"),
    ("spikes", "co_smoothing", "spikes"),
)


def main_rows(folder: Path) -> tuple[list[list[str]], float]:
    """All groups of the main model; and the minutes that it took."""
    brain = make(folder / "long", LONG_S, with_others=True)
    home = folder / "main"
    minutes = train(brain.seen / "store", home)
    unseen = np.arange(NUM_SEEN, 100)
    hub = home / "hub"
    groups = {
        "seen": score_beside_linear(home / "run", brain.seen),
        "unseen units, inferred": score_beside_linear(
            adapted(hub, brain.whole / "store", home / "whole", 0), brain.whole, unseen
        ),
        "unseen units, fitted": score_beside_linear(
            adapted(hub, brain.whole / "store", home / "whole_fit", FIT_STEPS), brain.whole, unseen
        ),
        "unseen subjects, inferred": score_beside_linear(adapted(hub, brain.new / "store", home / "new", 0), brain.new),
        "unseen subjects, fitted": score_beside_linear(
            adapted(hub, brain.new / "store", home / "new_fit", FIT_STEPS), brain.new
        ),
    }
    return [line for name, found in groups.items() for line in lines(name, found)], minutes


def lines(group: str, found: dict[tuple[str, str, str], dict[str, Any]]) -> list[list[str]]:
    """Rows of the table."""
    out = []
    for (modality, task, visible), figures in sorted(found.items()):
        ceiling, ours, other = figures.get("ceiling"), figures["model"], figures.get("linear")
        share = [f"{ours / ceiling:.0%}" if ceiling else "-", f"{other / ceiling:.0%}" if ceiling and other else "-"]
        numbers = [f"{x:.3f}" if x is not None else "-" for x in (ours, other, ceiling)]
        interval = "{:+.3f} to {:+.3f}".format(*figures["ahead"]) if "ahead" in figures else "-"
        out.append([group, modality, task, visible, *numbers, *share, interval])
    return out


HEAD = [
    "who",
    "modality",
    "task",
    "visible",
    "Brainloom",
    "linear",
    "ceiling",
    "Brainloom / ceiling",
    "linear / ceiling",
    "Brainloom - linear, 95 %",
]


def scaling_rows(folder: Path) -> list[list[str]]:
    """Three sizes on all data, three amounts of data at the middle size, all of the same number of steps."""
    cells = [(name, LONG_S) for name in SIZES] + [("128", amount) for amount in AMOUNTS_S[:-1]]
    rows = []
    whole = make(folder / "long", LONG_S, with_others=True)
    for size, amount in cells:
        brain = whole if amount == LONG_S else make(folder / f"amount{amount:.0f}", amount, with_others=False)
        width, inner = SIZES[size]
        home = folder / f"size{size}-{amount:.0f}"
        minutes = train(
            brain.seen / "store",
            home,
            f"train.num_steps={SCALING_STEPS}",
            f"model.overrides.hidden_size={width}",
            f"model.overrides.intermediate_size={inner}",
        )
        # The law of a brain does not depend on how long it was recorded: all are asked about the same test splits.
        found = score(adapted(home / "hub", whole.seen / "store", home / "long", 0), whole.seen)
        parameters = json.loads((home / "run" / "environment.json").read_text())["num_parameters_core"]
        picked = [found[key]["model"] / found[key]["ceiling"] for key in SCALING_TASKS]
        rows.append([size, f"{parameters:,}", f"{amount:.0f}", f"{minutes:.1f}", *(f"{x:.0%}" for x in picked)])
    return rows


def section(folder: Path, origin: list[str]) -> str:
    """The text of the section: all groups of one model."""
    torch.set_num_threads(2)
    rows, minutes = main_rows(folder)
    size = json.loads((folder / "main" / "run" / "environment.json").read_text())
    steps = config.load(folder / "main" / "run" / "config.yaml").train.num_steps
    parts = [
        "# A synthetic brain: how much of what can be known",
        *origin,
        ABOUT.format(
            steps=steps, minutes=minutes, core=size["num_parameters_core"], units=size["num_parameters_units"]
        ),
        results.table(HEAD, rows),
    ]
    return "\n\n".join(parts) + "\n"


def scaling_section(folder: Path, origin: list[str]) -> str:
    """The text of another: three sizes and three amounts of data."""
    torch.set_num_threads(2)
    names = [f"{task} of {modality}, {visible} visible" for modality, task, visible in SCALING_TASKS]
    parts = [
        "# A synthetic brain: sizes and amounts of data",
        *origin,
        f"{SCALING_STEPS} steps each, all asked about the test splits of the long sessions; shares of the ceiling:",
        results.table(["width", "core parameters", "seconds a session", "minutes", *names], scaling_rows(folder)),
    ]
    return "\n\n".join(parts) + "\n"


ABOUT = f"""Trained on {len(TRAINED)} sessions of {LONG_S:.0f} s ({NUM_SEEN} units of each of
{KINDS.count("spikes")} with spikes, 100 ROIs of each of {KINDS.count("traces")}), seed {TRAIN_SEED}, in
{{steps:,}} steps, {{minutes:.1f}} minutes on two cores: {{core:,}} core parameters, {{units:,}} in the unit table. New
subjects: {len(NEW)} sessions of {NEW_S:.0f} s, seed {NEW_SEED}, with a brain and a movie of their own.
Explained: D2 of counts, R2 of traces and behaviour, on the test split. Ceiling: the best that anybody
can do who knows the brain; exact for encoding, a bound that nobody reaches for the rest. Linear:
Poisson GLM and ridge on lags (tests/bench/science/linear.py), fitted on the same session's train split,
asked for the same samples; intervals over resampled windows. Inferred: rows from that train split,
nothing trained. Fitted: then {FIT_STEPS} steps of rows alone."""
