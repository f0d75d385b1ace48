"""Batches in the order of the sampler, read ahead.

In: a store and a run's configuration. Out: the batches of one rank, the same whatever the number of workers; what could
not be read, and was skipped.
"""

import queue
import threading
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prep.settings import TOKEN_NS, ConfigError
from prep.store import DigestError, Store
from train.config import RunConfig, Turn
from train.dataset import WindowReader, budget, collate, make_sample, may_show_frames, split_windows
from train.eras import Era, Orders, Sessions, eras_from
from train.masking import draw_mask
from train.mixing import session_key, session_weights
from train.model.configuration_brainloom import BrainloomConfig
from train.model.processing_brainloom import SESSION
from train.sampler import positions

READ_AHEAD = 4
NEW_SUBJECT, NEW_SESSION = 0.75, 0.125  # shares of samples that are as of a new subject, a new session of a known one


@dataclass(frozen=True)
class Skipped:
    """A window that could not be read; an empty one, of no weight, stands in its place."""

    position: int
    session: str
    start_s: float
    why: str  # names the file

    def __str__(self) -> str:
        return f"skipped a window of {self.session} (position {self.position}): {self.why}"


Batch = tuple[dict[str, Tensor], list[Skipped]]


class TrainingSamples:
    """Position -> sample, a pure function of (store, configuration, eras, position)."""

    def __init__(
        self, store: str | Path, config: RunConfig, model: BrainloomConfig, origins: Collection[str] | None = None
    ) -> None:
        """Those of a run that begins; `origins` as SourceTable has them. Raises ConfigError."""
        self.path, self.config, self.model, self.origins = store, config, model, origins
        opened = Store(store)
        longest_s = max(turn.context_s for turn in config.turns)
        self.windows = split_windows(opened, "train", longest_s, config.data.stride_s)
        self._keys = [session_key(entry) for entry in opened.entries]
        spans = self.windows.of_sessions()
        self._sessions: dict[str, Sessions] = {}
        for mix in ("", *sorted(config.data.weights.families)):
            weights = session_weights(opened.entries, config.data.weights, mix)
            self._sessions[mix] = {self._keys[n]: (span, weights[self._keys[n]]) for n, span in spans.items()}
        self.order = self._orders([], 0)
        for mix in {turn.mix if turn.mix in self._sessions else "" for turn in config.turns}:
            if not self.order.num_tickets(mix):
                raise ConfigError(
                    f"{store} has no window of {longest_s} s in the train split whose weight is more than 0"
                    f"{f' in the turns of {mix}' if mix else ''}. Shorten data.context_s, or ingest longer recordings."
                )
        self.budgets = {
            turn: budget(opened, replace(config.data, context_s=turn.context_s), turn.mix, origins)
            for turn in config.turns
        }
        self._reader: WindowReader | None = None  # opened by whoever reads, never carried into a worker
        self._skipped: list[Skipped] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    def go_on(self, state: Mapping[str, Any]) -> None:
        """The order of a run that goes on from a checkpoint with this state. Raises ConfigError."""
        self.order = self._orders(eras_from(state), int(state["position"]))

    def _orders(self, eras: list[Era], position: int) -> Orders:
        train = self.config.train
        mixes = [self.config.turn(step).mix for step in range(len(train.families))]
        return Orders(eras, self._sessions, mixes, train.global_batch_size, self.config.seed, position)

    def _open(self) -> WindowReader:
        if self._reader is None:
            self._reader = WindowReader(Store(self.path), self.model, self.config.data.max_frames, self.origins)
        return self._reader

    def window_at(self, position: int) -> tuple[str, float]:
        """Which session, as dataset/session, and from which second of its clock the window at a position is."""
        session, start_ns, _, _ = self._place(position)
        return self._keys[session], start_ns / 1e9

    def _place(self, position: int) -> tuple[int, int, Turn, np.random.Generator]:
        """Session, start_ns and turn of a position, and its source of chance for what else is drawn."""
        drawn = self.order.draw(position)
        chance = drawn.generator(self.config.seed)
        session, start_ns = self.windows.locate(drawn.window, chance.random())
        turn = self.config.turn(position // self.config.train.global_batch_size)
        context_ns = round(turn.context_s * 1e9)
        if context_ns < self.windows.context_ns:  # a part of the window that the longest turn would read
            start_ns += int(chance.random() * ((self.windows.context_ns - context_ns) // TOKEN_NS + 1)) * TOKEN_NS
        return session, start_ns, turn, chance

    def __getitem__(self, position: int) -> dict[str, Any]:
        reader, data = self._open(), self.config.data
        session, start_ns, turn, chance = self._place(position)
        context_ns = round(turn.context_s * 1e9)
        try:
            window = reader.read(session, start_ns, context_ns, data.max_units, chance, may_show_frames(turn.mix))
        except DigestError as error:
            if data.bad_windows == "stop":
                raise
            self._skipped.append(Skipped(position, self._keys[session], start_ns / 1e9, str(error)))
            window = reader.nothing(session, start_ns)  # so that nothing else in the run depends on what is damaged
        mask = draw_mask(turn.mix, window.tokens, turn.context_s, chance)
        sample = make_sample(window, mask, self.budgets[turn], chance)
        is_unit = sample["source_modality"] < 2
        dropped = is_unit & (chance.random(len(is_unit)) < self.config.train.unit_dropout)
        sample["unit_rows"][dropped] = -1
        sample["unit_rows"][_absent_origins(sample["source_modality"], chance)] = -1
        return sample

    def batch(self, at: Sequence[int], pinned: bool = False) -> Batch:
        """The samples at some positions as one batch, and what was skipped for it."""
        samples = [self[position] for position in at]
        skipped, self._skipped = self._skipped, []
        return collate(samples, pinned), skipped


def _absent_origins(modality: npt.NDArray[np.int64], chance: np.random.Generator) -> npt.NDArray[np.int64]:
    """Places (k,) of session and subject where both are absent, as in a recording of a new subject, or the session is.

    Else a core learns to lean on them, and has little to say of those that it has never met.
    """
    origins, drawn = np.flatnonzero(modality == SESSION), chance.random()
    return origins[: len(origins) if drawn < NEW_SUBJECT else 1 if drawn < NEW_SUBJECT + NEW_SESSION else 0]


class Feed(Iterator[dict[str, Tensor]]):
    """The micro-batches of one rank; `skipped` grows with what those that were taken could not read."""

    def __init__(self, read: Generator[Batch, None, None]) -> None:
        self._read, self.skipped = read, list[Skipped]()

    def __next__(self) -> dict[str, Tensor]:
        batch, skipped = next(self._read)
        self.skipped += skipped
        return batch

    def close(self) -> None:
        """End what reads ahead."""
        self._read.close()


def batches(samples: TrainingSamples, first_step: int, rank: int, world_size: int) -> Feed:
    """The micro-batches of one rank from `first_step` on, in pinned memory where they go to a GPU."""
    train, gpu = samples.config.train, torch.cuda.current_device() if torch.cuda.is_available() else None
    order = positions(first_step, train.num_steps, train.global_batch_size, train.micro_batch_size, rank, world_size)
    if samples.config.data.num_workers:
        return Feed(_by_workers(samples, order, pinned=gpu is not None))
    return Feed(read_ahead((samples.batch(at, gpu is not None) for at in order), gpu))


@dataclass
class _Batches(Dataset[Batch]):
    """What a worker reads: the batch of some positions."""

    samples: TrainingSamples

    def __getitem__(self, at: list[int]) -> Batch:
        return self.samples.batch(at)


def _by_workers(samples: TrainingSamples, order: Iterator[list[int]], pinned: bool) -> Generator[Batch, None, None]:
    """Batches read by processes, each of which opens the store itself."""
    yield from DataLoader(
        _Batches(samples),
        batch_size=None,
        sampler=order,
        num_workers=samples.config.data.num_workers,
        multiprocessing_context="spawn",  # a store opened before a fork can dead-lock
        prefetch_factor=READ_AHEAD,
        pin_memory=pinned,
        generator=torch.Generator(),  # else it draws from the run's own
    )


def read_ahead(items: Iterator[Batch], gpu: int | None = None) -> Generator[Batch, None, None]:
    """Run an iterator in a thread, a few items ahead; its error is raised here."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(READ_AHEAD)
    stop = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:  # look again whether anybody still wants it
                continue

    def fill() -> None:
        try:
            if gpu is not None:
                torch.cuda.set_device(gpu)  # a thread begins on the first one, and what it pins would take room there
            for item in items:
                put(item)
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:  # handed over: the consumer raises it
            put(error)

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move a batch."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
