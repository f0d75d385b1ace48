"""Training samples under watch: the loader's own samples of given windows, and the masks read back from their batch.

In: a trained run, a family. Out: windows, masks and predictions of a batch; how often samples share a mask.

Shape suffixes: n tokens.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from train.audit_windows import Array, Predictions
from train.build import model_config
from train.config import Family
from train.dataset import Window, WindowReader, collate
from train.loader import TrainingSamples
from train.masking import STIMULUS_DROP, Mask, cuts, is_activity
from train.model.processing_brainloom import middle
from train.trained import Trained

NUM_SAMPLES = 8
NUM_BATCHES = 40
SAME_AT_MOST = 0.6  # by chance; to the power of NUM_BATCHES less than 1e-8


class WatchedReader(WindowReader):
    """Hands out the windows that it is told, and remembers them."""

    def __init__(self, trained: Trained) -> None:
        origins = trained.reader.source_table.origin_keys
        super().__init__(trained.store, model_config(trained.run), trained.run.data.max_frames, origins)
        self.given: list[Window] = []
        self.instead: Callable[[int], Window] | None = None  # by the number of the window in its batch

    def read(
        self,
        index: int,
        start_ns: int,
        context_ns: int,
        max_units: int = 0,
        chance: np.random.Generator | None = None,
        with_frames: bool = True,
    ) -> Window:
        """Read as ever, so that the sample's chance moves on as ever; then hand out what was told.

        Frames are always there: what a task never shows must not reach the model either.
        """
        window = super().read(index, start_ns, context_ns, max_units, chance)
        if self.instead is not None:
            window = self.instead(len(self.given))
        self.given.append(window)
        return window


class TrainingBatches:
    """Batches of one family as the loader makes them, at positions from 0 on."""

    def __init__(self, trained: Trained, family: Family) -> None:
        self.trained, self.family = trained, family
        run = trained.run
        self.run = replace(
            run,
            train=replace(run.train, families=(family,), context_schedule=()),
            data=replace(run.data, weights=replace(run.data.weights, families={})),
        )
        origins = trained.reader.source_table.origin_keys
        self.samples = TrainingSamples(trained.store.address, self.run, model_config(self.run), origins)
        self.reader = WatchedReader(trained)
        self.samples._reader = self.reader

    def batch(
        self, positions: range, instead: Callable[[int], Window] | None = None
    ) -> tuple[dict[str, Tensor], list[Window]]:
        """The batch at positions, and its windows; `instead` gives others for them."""
        self.reader.given, self.reader.instead = [], instead
        return collate([self.samples[position] for position in positions]), self.reader.given

    def first(self) -> tuple[list[Window], list[Mask], int]:
        """The windows and masks of the first batch, and how many of its tokens are not of their windows."""
        batch, windows = self.batch(range(NUM_SAMPLES))
        found = [mask_of(batch, number, window) for number, window in enumerate(windows)]
        return windows, [mask for mask, _ in found], sum(num_strange for _, num_strange in found)

    def predict(self, windows: list[Window]) -> Predictions:
        """What comes of the first batch when it is made of these windows, labels given as in training.

        One flat array a sample: predictions, scales, and the latents on which everything else rests.
        """
        output = self._ask(self.batch(range(NUM_SAMPLES), windows.__getitem__)[0])
        parts = [output.predictions, output.log_scale, output.last_hidden_state]
        return list(torch.cat([part.float().flatten(1) for part in parts], dim=1).numpy())

    def answers(self, batch: dict[str, Tensor]) -> npt.NDArray[np.float32]:
        """Predictions (B, Q, P) of a batch."""
        predictions: npt.NDArray[np.float32] = self._ask(batch).predictions.float().numpy()
        return predictions

    def _ask(self, batch: dict[str, Tensor]) -> Any:
        rest = {name: tensor for name, tensor in batch.items() if name != "unit_rows"}
        embeds = self.trained.table.lookup(batch["unit_rows"]).detach()
        self.trained.table.discard()
        with torch.inference_mode():
            return self.trained.model(unit_embeds=embeds, **rest)


def mask_of(batch: dict[str, Tensor], number: int, window: Window) -> tuple[Mask, int]:
    """Which tokens (n,) of its window a sample sees, and of which it has labels; how many tokens are not of it."""
    tokens = window.tokens
    middle_s = middle(tokens.start_s, tokens.stop_s - tokens.start_s)
    num_strange, found = 0, []
    for kind, time_s, present in (
        ("input", middle_s, batch["input_mask"][number]),
        ("query", tokens.start_s, batch["label_mask"][number].any(-1)),
    ):
        of_window = _keys(tokens.source, time_s)
        source, own_time_s = (batch[f"{kind}_{column}"][number][present].numpy() for column in ("source", "time_s"))
        of_sample = _keys(source, own_time_s)
        num_strange += int((~np.isin(of_sample, of_window)).sum())
        found.append(np.isin(of_window, of_sample))
    visible, asked = found
    return Mask(visible, asked, frames=bool(batch["frame_mask"][number].any())), num_strange


def _keys(source: Array, time_s: Array) -> npt.NDArray[np.int64]:
    """A token by its source and the bits of its time, as one number."""
    keys: npt.NDArray[np.int64] = source.astype(np.int64) << 32 | time_s.astype(np.float32).view(np.uint32)
    return keys


def own_mask_share(batches: TrainingBatches, windows: list[Window]) -> float | None:
    """All samples of a batch made of one window: how often a place of the batch has the mask of the first.

    The largest share over the places, 1 where it is so in every batch. None where honest masks are too often the same.
    """
    context_s = batches.run.data.context_s
    window = next((one for one in windows if chance_of_same(batches.family, one, context_s) <= SAME_AT_MOST), None)
    if window is None:
        return None
    size = batches.run.train.global_batch_size
    num_places = min(NUM_SAMPLES, size) if size > 1 else NUM_SAMPLES
    num_same = np.zeros(num_places - 1)
    for number in range(NUM_BATCHES):
        begin = number * max(size, num_places)
        batch, _ = batches.batch(range(begin, begin + num_places), lambda _: window)
        first, *rest = (mask_of(batch, place, window)[0] for place in range(num_places))
        num_same += [not _differ(first, mask) for mask in rest]
    return float(num_same.max() / NUM_BATCHES)


def _differ(one: Mask, other: Mask) -> bool:
    """Does one mask show what the other asks for? Samples of one mask never do, whatever the budget leaves out."""
    return bool((one.asked & other.visible).any() or (other.asked & one.visible).any() or one.frames != other.frames)


def chance_of_same(family: Family, window: Window, context_s: float) -> float:
    """An upper bound for how often two honest masks of a window are the same."""
    activity = is_activity(window.tokens)
    if family == "co_smoothing":
        return 1 / max(1, len(np.unique(window.tokens.source[activity])))
    if family == "forecasting":
        return 1 / max(1, len(cuts(window.tokens.stop_s[activity], context_s)))
    if family == "encoding":
        return STIMULUS_DROP**2 + (1 - STIMULUS_DROP) ** 2 if len(window.pixels) else 1.0
    return 1.0 if family == "decoding" or not len(window.values) else 0.58
