"""Scores while a run goes on: deviance explained on fixed windows of the valid split, by task, region and session.

In: a store, a run, and what predicts a batch. Out: the same scores for any number of ranks.

The windows, their units and their batches are the same all run long. Ranks take batches in turn, all of them equally
many: those at the end that are taken again do not count. Deviances add up, so that ranks exchange sums alone.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from prep.settings import ACTIVITY
from prep.store import Store
from train.build import model_config
from train.config import RunConfig
from train.dataset import Window, WindowReader, collate_windows, split_windows
from train.evaluate import spread_windows, suits
from train.loader import to_device
from train.masking import TASKS, Task, task_mask
from train.metrics import deviances, share_explained
from train.modalities import COUNTED

LABEL = "valid"
NOT_GIVEN = "not given"
Array = npt.NDArray[Any]
Predict = Callable[[dict[str, Tensor], float], Tensor]


@dataclass(frozen=True)
class Item:
    """One task on one window, the session's `number`-th."""

    task: Task
    session: int
    number: int
    start_ns: int


@dataclass(frozen=True)
class Group:
    """Values whose deviances are added up: of a task, in one region of one session."""

    task: Task
    session: int
    region: str


class Validation:
    """The fixed windows of a run."""

    def __init__(self, store: Store, run: RunConfig) -> None:
        self._run, self._store = run, store
        self._reader = WindowReader(store, model_config(run), run.data.max_frames)
        self._items = list(_items(store, run)) if run.validate_every else []
        self._region: dict[int, Array] = {}  # of each unit of a session, a number
        self._first: dict[tuple[Task, int], int] = {}  # group of a task in a session; those of its regions follow
        self._groups: list[Group] = []
        for task, session in dict.fromkeys((item.task, item.session) for item in self._items):
            self._first[task, session] = len(self._groups)
            self._groups += [Group(task, session, name) for name in self._regions(task, session)]

    def _regions(self, task: Task, session: int) -> list[str]:
        if task.modality not in ACTIVITY:
            return [""]
        names, self._region[session] = np.unique(self._store.session(session).text("units/region"), return_inverse=True)
        return [str(name) or NOT_GIVEN for name in names]

    def is_due(self, num_done: int) -> bool:
        """Is it time, after so many steps?"""
        is_last = num_done == self._run.train.num_steps
        return bool(self._items) and (is_last or num_done % self._run.validate_every == 0)

    def score(self, predict: Predict, device: torch.device) -> dict[str, Any]:
        """Scores of all tasks; every rank calls it, and each calls `predict` equally often."""
        began_s = time.perf_counter()
        sums = torch.from_numpy(self._sums(predict, device)).to(device)
        if dist.is_initialized():
            dist.all_reduce(sums)
        return {
            "num_windows": len({(item.session, item.number) for item in self._items}),
            "scores": self._scores(sums.cpu().numpy()),
            "seconds": time.perf_counter() - began_s,
        }

    def _sums(self, predict: Predict, device: torch.device) -> npt.NDArray[np.float64]:
        """Of this rank's batches, by group: deviance, null deviance, number of values (G, 3)."""
        rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        size, context_s = self._run.train.micro_batch_size, self._run.data.context_s
        batches = [self._items[first : first + size] for first in range(0, len(self._items), size)]
        sums = np.zeros((len(self._groups), 3))
        for turn in range(rank, -(-len(batches) // num_ranks) * num_ranks, num_ranks):
            items = batches[turn % len(batches)]
            windows = [self._read(item) for item in items]
            masks = [task_mask(item.task, w.tokens, context_s) for item, w in zip(items, windows, strict=True)]
            batch = to_device(collate_windows(windows, masks), device)
            predictions = predict(batch, context_s).float().cpu().numpy()
            if turn < len(batches):
                for item, window, mask, prediction in zip(items, windows, masks, predictions, strict=True):
                    self._add(sums, item, window, np.flatnonzero(mask.asked), prediction)
        return sums

    def _read(self, item: Item) -> Window:
        chance = np.random.default_rng([self._run.seed, item.session, item.number])
        context_ns = round(self._run.data.context_s * 1e9)
        return self._reader.read(item.session, item.start_ns, context_ns, self._run.data.max_units, chance)

    def _add(self, sums: Array, item: Item, window: Window, asked: Array, prediction: Array) -> None:
        """Add a window's n asked tokens, predicted (n, P)."""
        observed, sources, modality = window.observed[asked], window.sources, item.task.modality
        source = np.repeat(window.tokens.source[asked], observed.sum(1))
        truth, expected = window.labels[asked][observed], prediction[: len(asked)][observed]
        null = sources.mean[source] if modality in COUNTED else np.zeros(len(source), np.float32)
        group = np.full(len(source), self._first[item.task, item.session])
        if modality in ACTIVITY:
            first_units = np.array(
                [stream["first_unit"] or 0 for stream in self._store.entries[item.session]["streams"]]
            )
            group += self._region[item.session][first_units[sources.stream[source]] + sources.place[source]]
        columns = deviances(modality, truth, expected), deviances(modality, truth, null), np.ones(len(source))
        sums += np.stack([np.bincount(group, column, len(sums)) for column in columns], axis=1)

    def _scores(self, sums: Array) -> list[dict[str, Any]]:
        """A row for each task as a whole, then by session, then by region."""
        entries, rows = self._store.entries, []
        names: dict[str, Callable[[Group], str]] = {
            "all": lambda group: "",
            "session": lambda group: f"{entries[group.session]['dataset_id']}/{entries[group.session]['session_id']}",
            "region": lambda group: group.region,
        }
        for of, name in names.items():
            added: dict[tuple[Task, str], Array] = {}
            for group, own in zip(self._groups, sums, strict=True):
                if of != "region" or group.region:
                    key = group.task, name(group)
                    added[key] = added.get(key, np.zeros(3)) + own
            rows += [_score(task, of, named, total) for (task, named), total in added.items() if total[2]]
        return rows


def _score(task: Task, of: str, name: str, total: Array) -> dict[str, Any]:
    explained = share_explained(float(total[0]), float(total[1]))
    return {
        "modality": task.modality,
        "task": task.family,
        "visible": list(task.visible),
        "of": of,
        "name": name,
        "deviance_explained": explained if math.isfinite(explained) else None,
        "num_values": int(total[2]),
    }


def _items(store: Store, run: RunConfig) -> Iterator[Item]:
    """Task by task, so that the windows of a batch are alike."""
    context_s = run.data.context_s
    windows = split_windows(store, LABEL, context_s, context_s)
    starts = [spread_windows(windows, session, run.validate_windows) for session in range(len(store.entries))]
    for task in TASKS:
        for session, entry in enumerate(store.entries):
            if suits(task, entry):
                yield from (Item(task, session, number, start) for number, start in enumerate(starts[session]))
