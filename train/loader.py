"""Batches in the order of the sampler, read ahead.

In: a store and a run's configuration. Out: (step, batch) for one rank; the same whatever the number of workers.
"""

import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prep.settings import TOKEN_NS, ConfigError
from prep.store import Store
from train.config import RunConfig
from train.dataset import WindowReader, budget, collate, make_sample, split_windows
from train.masking import draw_mask
from train.model.configuration_brainloom import BrainloomConfig
from train.sampler import draw, positions

READ_AHEAD = 4


class TrainingSamples(Dataset[dict[str, Any]]):
    """Position -> sample, a pure function of (store, configuration, position)."""

    def __init__(self, store: str | Path, config: RunConfig, model: BrainloomConfig) -> None:
        self.path, self.config, self.model = store, config, model
        opened = Store(store)
        longest_s = max(turn.context_s for turn in config.turns)
        self.windows = split_windows(opened, "train", longest_s, config.data.stride_s)
        if not len(self.windows):
            raise ConfigError(
                f"{store} has no window of {longest_s} s in the train split. "
                "Shorten data.context_s, or ingest longer recordings."
            )
        self.budgets = {
            turn: budget(opened, replace(config.data, context_s=turn.context_s), turn.mix) for turn in config.turns
        }
        self._reader: WindowReader | None = None  # opened by whoever reads, never carried into a worker

    def __getitem__(self, position: int) -> dict[str, Any]:
        if self._reader is None:
            self._reader = WindowReader(Store(self.path), self.model, self.config.data.max_frames)
        config = self.config
        drawn = draw(position, len(self.windows), config.seed, config.train.global_batch_size)
        chance = drawn.generator(config.seed)
        session, start_ns = self.windows.locate(drawn.window, chance.random())
        turn = config.turn(drawn.step)
        context_ns = round(turn.context_s * 1e9)
        if context_ns < self.windows.context_ns:  # a part of the window that the longest turn would read
            start_ns += int(chance.random() * ((self.windows.context_ns - context_ns) // TOKEN_NS + 1)) * TOKEN_NS
        window = self._reader.read(session, start_ns, context_ns, config.data.max_units, chance)
        mask = draw_mask(turn.mix, window.tokens, turn.context_s, chance)
        sample = make_sample(window, mask, self.budgets[turn], chance)
        is_unit = sample["source_modality"] < 2
        dropped = is_unit & (chance.random(len(is_unit)) < config.train.unit_dropout)
        sample["unit_rows"][dropped] = -1
        return sample


def batches(
    samples: TrainingSamples, first_step: int, rank: int, world_size: int
) -> Generator[dict[str, Tensor], None, None]:
    """The micro-batches of one rank from `first_step` on."""
    train = samples.config.train
    order = positions(first_step, train.num_steps, train.global_batch_size, train.micro_batch_size, rank, world_size)
    if samples.config.data.num_workers:
        loader = DataLoader(
            samples,
            batch_sampler=list(order),
            collate_fn=collate,
            num_workers=samples.config.data.num_workers,
            multiprocessing_context="spawn",  # a store opened before a fork can dead-lock
            prefetch_factor=READ_AHEAD,
        )
        yield from loader
    else:
        yield from _read_ahead(collate([samples[position] for position in batch]) for batch in order)


def _read_ahead(items: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Run an iterator in a thread, a few items ahead; its error is raised here."""
    ready: queue.Queue[dict[str, Tensor] | BaseException | None] = queue.Queue(READ_AHEAD)
    stop = threading.Event()

    def put(item: dict[str, Tensor] | BaseException | None) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def fill() -> None:
        try:
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
