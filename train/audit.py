"""The leak audit: nothing that a task hides reaches the model, shown on a run's checkpoint, store and code.

In: a run folder. Out: a table of tasks and checks, a line for each leak (exit code 1), audit.json in the run folder.

What must be hidden is derived here from a task's definition and from the store's own clocks: the masks are what is
audited. Hidden values are replaced in the window, before masks, samples and batches are made of it.

Shape suffixes: n tokens, P samples per token, F frames.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from prep.settings import ACTIVITY
from prep.settings import MODALITIES as STORED
from prep.store import Store
from train import masking
from train.audit_training import NUM_SAMPLES, TrainingBatches, mask_of, own_mask_share
from train.audit_windows import Bools, Predictions, Replacement, companion, difference, shift, shuffle, spoil, unshuffle
from train.build import model_config
from train.config import ALL_FAMILIES, Family
from train.dataset import Window, WindowReader
from train.evaluate import spread, suits
from train.event_counts import as_read
from train.masking import TASKS, Mask, Task, TokenTable, is_activity
from train.modalities import MODALITIES, Modality
from train.model.decoder_brainloom import NUM_FOLDS
from train.trained import Trained, load_trained

TOLERANCE = 1e-5  # of what the order of a sum may change, relative to the largest prediction where that is above 1
MOVED_NS = 40_000_000_000_000_123  # more than a year: absolute time in float32 does not survive it
SEES: dict[Family, tuple[Modality, ...]] = {  # of the store's modalities: events are of behaviour, or of the stimulus
    "co_smoothing": ACTIVITY,
    "forecasting": ACTIVITY,
    "decoding": ACTIVITY,
    "encoding": ("behavior", "stimulus"),
    "inpainting": STORED,
    "leave_out": ACTIVITY,
}
ASKS: dict[Family, tuple[Modality, ...]] = {  # activity elsewhere
    "decoding": ("behavior", "events"),
    "inpainting": MODALITIES,
}
REPLACEMENTS: tuple[Replacement, ...] = ("noise", "NaN", "other")
CHECKS = {  # check: (what is wrong where it fails, what to look at)
    "mask": ("the mask shows what the task hides", "in train/masking.py"),
    "noise": ("predictions follow hidden values", "make_sample in train/dataset.py, then input_mask in the model"),
    "NaN": ("predictions follow hidden values", "make_sample in train/dataset.py, then input_mask in the model"),
    "other": ("predictions follow hidden values", "make_sample in train/dataset.py, then input_mask in the model"),
    "future": ("predictions follow the future", "make_sample in train/dataset.py, then input_mask in the model"),
    "batch": (
        "predictions follow a window's company or its place in the batch",
        "what mixes the batch axis in the model",
    ),
    "order": ("predictions follow the order of sources, tokens or frames", "what counts positions in the model"),
    "padding": ("predictions follow the padding", "input_mask and frame_mask in the model, pad in train/dataset.py"),
    "clock": ("predictions follow absolute time", "WindowReader in train/dataset.py: int64 until the start is gone"),
    "own": ("samples share a mask", "TrainingSamples in train/loader.py, collate in train/dataset.py"),
    "seen": (
        "predictions do not follow what is visible, so nothing is shown",
        "whether the run has trained (metrics.jsonl)",
    ),
}


class AuditError(ValueError):
    """There is nothing to audit; the message says why."""


@dataclass(frozen=True)
class Row:
    """One check of one task: the largest difference (a number of values for `mask`), and whether it failed."""

    task: str
    check: str
    difference: float
    failed: bool
    detail: str = ""


@dataclass(frozen=True)
class Case:
    """Windows under a task: what it may see (in the store's words), what it may ask for, its masks, its predictions."""

    name: str
    family: Family
    sees: tuple[Modality, ...]
    asks: tuple[Modality, ...]
    windows: list[Window]
    masks: list[Mask]
    predict: Callable[[list[Window]], Predictions]
    cut_ns: int | None = None  # of a forecast, from the window's start; None: where what is asked begins


# ---------------------------------------------------------------- what must be hidden


def sample_times_ns(store: Store, window: Window) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The first and the last nanosecond of which each sample tells, both (n, P), from the window's start.

    By the store's own clocks. A sample that no stream has (padding of P) stands at its token's first.
    """
    session, entry = store.session(window.session), store.entries[window.session]
    stream_of, place = (column[window.tokens.source] for column in (window.sources.stream, window.sources.place))
    first = np.repeat((window.token_ns - window.start_ns)[:, None], window.values.shape[1], axis=1)
    last = first.copy()
    for number in np.unique(stream_of):
        read, own = as_read(entry["streams"][number]), stream_of == number
        stream = session.stream(read["name"])
        offset_ns = np.zeros(own.sum(), np.int64) if stream.offset_ns is None else stream.offset_ns[place[own]]
        sample = np.arange(first.shape[1]) * (np.arange(first.shape[1]) < read["samples_per_token"])
        first[own] += offset_ns[:, None] + sample * read["sample_ns"]
        last[own] = first[own] + (read["sample_ns"] - 1 if read["kind"] in ("counts", "event") else 0)
    return first, last


def future(store: Store, case: Case, number: int) -> tuple[Bools, Bools]:
    """Samples (n, P) and frames (F,) of a window from a forecast's cut on; a bin belongs to where it ends."""
    window, asked = case.windows[number], case.masks[number].asked
    first, last = sample_times_ns(store, window)
    begins = int(first[asked].min(initial=np.iinfo(np.int64).max))
    cut_ns = begins if case.cut_ns is None else case.cut_ns
    return last >= cut_ns, window.frame_time_s * 1e9 >= cut_ns


def must_hide(store: Store, case: Case, number: int) -> tuple[Bools, Bools]:
    """Samples (n, P) and frames (F,) of a window that the task's definition hides, given what is asked for."""
    window, asked = case.windows[number], case.masks[number].asked
    tokens, row = window.tokens, window.sources.row
    hidden = ~_stored_as(store, window, case.sees) | asked
    if case.family == "co_smoothing":  # the whole unit, in whichever stream it is
        hidden |= np.isin(row[tokens.source], row[tokens.source[asked]])
    samples = np.repeat(hidden[:, None], window.values.shape[1], axis=1)
    if case.family == "forecasting":
        samples |= is_activity(tokens)[:, None] & future(store, case, number)[0]
    return samples, np.full(len(window.pixels), "stimulus" not in case.sees)


def _is_one_of(tokens: TokenTable, modalities: tuple[Modality, ...]) -> Bools:
    among: Bools = np.isin(tokens.modality, [MODALITIES.index(name) for name in modalities])
    return among


def _stored_as(store: Store, window: Window, modalities: tuple[Modality, ...]) -> Bools:
    """Which tokens (n,) come from streams of some modalities, as the store has them."""
    streams = store.entries[window.session]["streams"]
    among = np.array([stream["modality"] in modalities for stream in streams], np.bool_)
    stored: Bools = among[window.sources.stream[window.tokens.source]]
    return stored


def mask_check(store: Store, case: Case) -> Row:
    """Counts values that the masks show and the definition hides, and tokens that are asked and not the task's."""
    num_shown = num_foreign = 0
    first = ""
    for number, (window, mask) in enumerate(zip(case.windows, case.masks, strict=True)):
        samples, shots = must_hide(store, case, number)
        shown = samples & mask.visible[:, None]
        num_shots = int(shots.sum()) * mask.frames
        num_shown += int(shown.sum()) + num_shots
        num_foreign += int((mask.asked & ~_is_one_of(window.tokens, case.asks)).sum())
        if not first and (shown.any() or num_shots):
            first = _name(store, window, np.flatnonzero(shown.any(1)))
    detail = f"{num_shown} values are shown that must be hidden (first {first or 'none'})"
    detail += f", {num_foreign} tokens are asked for that are not the task's" if num_foreign else ""
    return Row(case.name, "mask", num_shown + num_foreign, num_shown + num_foreign > 0, detail)


def _name(store: Store, window: Window, tokens: npt.NDArray[np.int64]) -> str:
    entry = store.entries[window.session]
    if not len(tokens):
        return f"the stimulus of {entry['session_id']}"
    source, start_s = window.tokens.source[tokens[0]], window.tokens.start_s[tokens[0]]
    stream = entry["streams"][window.sources.stream[source]]["name"]
    return f"source {window.sources.place[source]} of {entry['session_id']}/{stream} at {start_s:.3f} s of its window"


# ---------------------------------------------------------------- the checks


def value_checks(store: Store, case: Case) -> Iterator[Row]:
    """Hidden values replaced, the future shifted: not one bit may change. Visible values replaced: something must."""
    chance = np.random.default_rng(0)
    before = case.predict(case.windows)
    hidden = []
    for number, mask in enumerate(case.masks):
        samples, shots = must_hide(store, case, number)
        hidden.append((samples | ~mask.visible[:, None], shots | (not mask.frames)))
    others = [*case.windows[1:], case.windows[0]]
    for how in REPLACEMENTS:
        pairs = zip(case.windows, hidden, others, strict=True)
        apart = difference(before, case.predict([spoil(window, h, how, other, chance) for window, h, other in pairs]))
        yield Row(case.name, how, apart, apart > 0)
    if case.family == "forecasting":
        after = [shift(window, *future(store, case, number)) for number, window in enumerate(case.windows)]
        apart = difference(before, case.predict(after))
        yield Row(case.name, "future", apart, apart > 0)
    visible = [(~samples, ~shots) for samples, shots in hidden]
    if any(samples.any() or shots.any() for samples, shots in visible):
        after = [spoil(window, v, "noise", window, chance) for window, v in zip(case.windows, visible, strict=True)]
        apart = difference(before, case.predict(after))
        yield Row(case.name, "seen", apart, apart == 0, "noise in its place changes nothing")


def fold_checks(store: Store, batches: TrainingBatches) -> Iterator[Row]:
    """One fold after the other replaced: what is asked of its units may not change by one bit; of others it must."""
    name, chance = f"training {batches.family}", np.random.default_rng(0)
    batch, windows = batches.batch(range(NUM_SAMPLES))
    fold_BS = batch["source_fold"]
    fold_BQ = torch.where(batch["label_mask"].any(-1), fold_BS.gather(1, batch["query_source"]), -1).numpy()
    foreign = 0
    for number, window in enumerate(windows):
        mask, num_strange = mask_of(batch, number, window)
        foreign += num_strange + int((mask.visible & ~_stored_as(store, window, ACTIVITY)).sum()) + int(mask.frames)
    yield Row(name, "mask", foreign, foreign > 0, f"{foreign} tokens or films are shown that are no activity")
    before = batches.answers(batch)
    for how in ("noise", "other"):  # of values that others may see, so that they are never missing
        apart = seen = 0.0
        for fold in range(NUM_FOLDS):
            spoiled = []
            for number, window in enumerate(windows):
                row = window.sources.row  # the whole unit, in whichever stream it is
                in_fold = row[fold_BS[number, : len(row)].numpy() == fold]
                own = np.isin(row[window.tokens.source], in_fold)
                samples = np.repeat(own[:, None], window.values.shape[1], axis=1)
                shots = np.zeros(len(window.pixels), np.bool_)
                spoiled.append(spoil(window, (samples, shots), how, windows[number - 1], chance))
            after = batches.answers(batches.batch(range(NUM_SAMPLES), spoiled.__getitem__)[0])
            apart = max(apart, difference([before[fold_BQ == fold]], [after[fold_BQ == fold]]))
            others = (fold_BQ >= 0) & (fold_BQ != fold)
            seen = max(seen, difference([before[others]], [after[others]]))
        yield Row(name, how, apart, apart > 0)
        if how == "noise" and (fold_BQ >= 0).any():
            yield Row(name, "seen", seen, seen == 0, "noise in its place changes nothing")


def order_checks(trained: Trained, case: Case) -> Iterator[Row]:
    """Other company, sources and tokens in another order, more padding: the same predictions within TOLERANCE."""
    chance = np.random.default_rng(1)
    before = trained.predict(case.windows, case.masks)
    alone = [trained.predict([window], [mask])[0] for window, mask in zip(case.windows, case.masks, strict=True)]
    yield _within(case.name, "batch", before * 2, alone + trained.predict(case.windows[::-1], case.masks[::-1])[::-1])
    after = {}
    windows, masks, orders = zip(
        *(shuffle(window, mask, chance) for window, mask in zip(case.windows, case.masks, strict=True)), strict=True
    )
    predictions = trained.predict(list(windows), list(masks))
    after["order"] = [unshuffle(*parts) for parts in zip(predictions, masks, orders, strict=True)]
    window, mask = companion(max(case.windows, key=lambda one: one.values.size + one.pixels.size))
    after["padding"] = trained.predict([*case.windows, window], [*case.masks, mask])[:-1]
    for check, predicted in after.items():
        yield _within(case.name, check, before, predicted)


def clock_check(trained: Trained, case: Case, task: Task, moved: list[Window]) -> Row:
    """The same windows of a recording whose clock was moved, and masks drawn on those."""
    masks = [masking.task_mask(task, window.tokens, trained.run.data.context_s) for window in moved]
    return _within(case.name, "clock", case.predict(case.windows), trained.predict(moved, masks))


def _within(task: str, check: str, before: Predictions, after: Predictions) -> Row:
    allowed = TOLERANCE * max(1.0, *(float(np.abs(array).max(initial=0)) for array in before))
    apart = difference(before, after)
    return Row(task, check, apart, apart > allowed)


# ---------------------------------------------------------------- what is audited


def read_twice(trained: Trained, label: str, session: int, num_windows: int) -> list[tuple[Window, Window]]:
    """Windows of a session as it was recorded, and with all its clocks moved."""
    context_ns = round(trained.run.data.context_s * 1e9)
    shape, origins = model_config(trained.run), trained.reader.source_table.origin_keys
    moved = WindowReader(Store(trained.store.address), shape, trained.run.data.max_frames, origins)
    opened = moved.store.session(session)
    for name in opened.stream_names:
        opened.stream(name).start_ns = opened.stream(name).start_ns + MOVED_NS
    splits = opened.entry["splits"]
    splits[:] = [(start + MOVED_NS, stop + MOVED_NS, block) for start, stop, block in splits]
    return [
        (trained.reader.read(session, start, context_ns), moved.read(session, start + MOVED_NS, context_ns))
        for start in spread(trained, label, session, num_windows)
    ]


def audit_tasks(
    trained: Trained, label: str, num_sessions: int, num_windows: int, tasks: Sequence[Task] = TASKS
) -> Iterator[Row]:
    """Every check of every task of evaluation that the store suits, on held-out windows."""
    read: dict[int, list[tuple[Window, Window]]] = {}
    for task in tasks:
        suited = [number for number, entry in enumerate(trained.store.entries) if suits(task, entry)]
        if not suited:
            continue
        chosen = np.unique(np.linspace(0, len(suited) - 1, num_sessions).round().astype(int))
        for session in (suited[i] for i in chosen):
            if session not in read:
                read[session] = read_twice(trained, label, session, num_windows)
        pairs = [pair for i in chosen for pair in read[suited[i]]]
        if pairs:
            case = task_case(trained, task, [window for window, _ in pairs])
            yield mask_check(trained.store, case)
            yield from value_checks(trained.store, case)
            yield from order_checks(trained, case)
            yield clock_check(trained, case, task, [moved for _, moved in pairs])


def task_case(trained: Trained, task: Task, windows: list[Window]) -> Case:
    """A task of evaluation on windows, predicted as evaluation does."""
    context_s = trained.run.data.context_s
    masks = [masking.task_mask(task, window.tokens, context_s) for window in windows]
    return Case(
        name=f"{task.modality} {task.family} | {'+'.join(task.visible)}",
        family=task.family,
        sees=task.visible,
        asks=(task.modality,),
        windows=windows,
        masks=masks,
        predict=lambda changed: trained.predict(changed, masks),
        cut_ns=round(context_s * 1e9 / 2),
    )


def audit_training(trained: Trained, families: Sequence[Family] = ALL_FAMILIES) -> Iterator[Row]:
    """The samples on which a run trains, family by family; their masks are read back from the batch."""
    for family in families:
        batches = TrainingBatches(trained, family)
        if family == "leave_out":
            yield from fold_checks(trained.store, batches)
            continue
        windows, masks, num_strange = batches.first()
        case = Case(
            name=f"training {family}",
            family=family,
            sees=SEES[family],
            asks=ASKS.get(family, ACTIVITY),
            windows=windows,
            masks=masks,
            predict=batches.predict,
        )
        yield mask_check(trained.store, case)
        yield from value_checks(trained.store, case)
        yield from order_checks(trained, case)
        if num_strange:
            yield Row(case.name, "own", np.inf, True, f"{num_strange} tokens of a sample are not of its window")
        elif (share := own_mask_share(batches, windows)) is not None:
            yield Row(case.name, "own", share, share == 1, "a sample has the mask of its batch's first in every batch")


# ---------------------------------------------------------------- what is said


def failures(rows: list[Row]) -> list[str]:
    """A line for each thing that is wrong with a task: what was seen, and what to look at."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.failed:
            found.setdefault((row.task, CHECKS[row.check][1]), []).append(row)
    by_mask = {row.task for row in rows if row.failed and row.check == "mask"}
    lines = []
    for (task, place), group in found.items():
        what, verdict = CHECKS[group[0].check][0], "BLIND" if group[0].check == "seen" else "LEAK"
        seen = f"by up to {max(row.difference for row in group):.2g} ({', '.join(row.check for row in group)})"
        if group[0].check == "mask":
            place = f"{'draw_mask' if task.startswith('training') else 'task_mask'} {place}"
        elif group[0].check in (*REPLACEMENTS, "future") and task in by_mask:
            place = "the mask first; it shows them"
        lines.append(f"{verdict} {task}: {what}, {group[0].detail or seen}. Look at {place}.")
    return lines


def table(rows: list[Row]) -> str:
    """Tasks down, checks across: the largest difference, and the verdict."""
    width = max(len(row.task) for row in rows)
    lines = [" ".join([" " * width, *(f"{check:>7}" for check in CHECKS)])]
    for task in dict.fromkeys(row.task for row in rows):
        own = {row.check: row for row in rows if row.task == task}
        cells = [f"{own[check].difference:.2g}" if check in own else "-" for check in CHECKS]
        failed = [check for check, row in own.items() if row.failed]
        verdict = "ok" if not failed else "BLIND" if failed == ["seen"] else "LEAK"
        lines.append(" ".join([f"{task:<{width}}", *(f"{cell:>7}" for cell in cells), f" {verdict}"]))
    return "\n".join(lines)


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m train audit`."""
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--split", choices=["valid", "test"], default="valid")
    parser.add_argument("--sessions", type=int, default=3, help="sessions per task, evenly spread over the store")
    parser.add_argument("--windows", type=int, default=2, help="windows per session, evenly spread")


def main(args: argparse.Namespace) -> int:
    """Audit, print and save."""
    trained = load_trained(args.run_dir)
    rows = list(audit_tasks(trained, args.split, args.sessions, args.windows))
    if not rows:
        raise AuditError(
            f"{trained.store.address} has no {args.split} window of {trained.run.data.context_s} s on which a task "
            "could be asked. Give the other --split, or a store with longer recordings."
        )
    rows += audit_training(trained)
    lines = failures(rows)
    content: dict[str, Any] = {"split": args.split, "failures": lines, "rows": [asdict(row) for row in rows]}
    (args.run_dir / "audit.json").write_text(json.dumps(content, indent=1))
    print(table(rows))
    print("\n".join(lines) if lines else "Nothing that is hidden was seen.")
    return 1 if lines else 0
