"""A model that can be asked: its weights, and the unit rows of a store.

In: a run folder with a checkpoint, or a hub folder and a store. Out: Trained, which predicts windows under masks.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from prep.settings import ConfigError
from prep.store import Store
from train import checkpoint, config
from train.build import model_config
from train.dataset import Window, WindowReader, collate_windows
from train.masking import Mask
from train.model.modeling_brainloom import BrainloomForPreTraining
from train.model.processing_brainloom import SESSION, BrainloomProcessor
from train.unit_table import UnitTable

MISFITS = ("size mismatch", "mismatched", "Missing key", "Unexpected key")  # as torch and transformers say it
ADAPTED = "adapt.json"  # what makes a folder an adapted model's


@dataclass
class Trained:
    """A model that can be asked: weights from a checkpoint, unit rows by this store's keys."""

    run: config.RunConfig
    store: Store
    model: BrainloomForPreTraining
    table: UnitTable
    reader: WindowReader

    def predict(self, windows: list[Window], masks: list[Mask]) -> list[npt.NDArray[np.float32]]:
        """Predictions (n asked, P) of each window, in the model's units."""
        batch = self.batch(windows, masks)
        del batch["labels"], batch["label_mask"]
        with torch.inference_mode():
            predictions = self.model(**batch).predictions.numpy()
        return [p[: int(mask.asked.sum())] for p, mask in zip(predictions, masks, strict=True)]

    def batch(self, windows: list[Window], masks: list[Mask]) -> dict[str, torch.Tensor]:
        """The model's arguments for windows under masks, in the smallest shape that holds them all."""
        batch = collate_windows(windows, masks)
        embeds = self.table.lookup(batch.pop("unit_rows")).detach()
        self.table.discard()
        return {"unit_embeds": embeds, **batch}


@contextlib.contextmanager
def weights_that_fit(folder: Path) -> Iterator[None]:
    """Weights of other shapes than the model has are another version's; what torch says of them is a page."""
    try:
        yield
    except RuntimeError as error:
        if not any(said in str(error) for said in MISFITS):
            raise  # memory, a disk: nothing that another version would mend
        raise ConfigError(
            f"{folder} holds weights of other names or shapes than this version's model has: another version wrote it. "
            "Use that version, or train anew."
        ) from error


def weight_files(hub: Path) -> list[Path]:
    """Where the weights of a hub folder are; raises ConfigError where it is none."""
    for pattern in ("config.json", weights := "model*.safetensors"):
        if not any(hub.glob(pattern)):
            raise ConfigError(f"{hub} is no hub folder: it has no {pattern}. Make one: make export RUN_DIR=… HUB={hub}")
    return sorted(hub.glob(weights))


def load_trained(run_dir: Path) -> Trained:
    """The newest sealed checkpoint of a run, as a plain model in fp32; or an adapted model (train/adapt.py)."""
    if (run_dir / ADAPTED).exists():
        return load_adapted(run_dir)
    run = config.load(run_dir / "config.yaml")
    store = Store(json.loads((run_dir / "run.json").read_text())["store"])
    found = checkpoint.newest_of_run(run_dir)
    shape = model_config(run)
    model = BrainloomForPreTraining(shape)
    with weights_that_fit(run_dir):
        model.load_state_dict(checkpoint.full_state(found))
    rows, keys = found.table()
    reader = WindowReader(store, shape, run.data.max_frames, set(keys))  # who was not there then has no row
    table = UnitTable(reader.source_table.keys, shape.unit_embed_size, torch.device("cpu"))
    table.load({**rows, "weight": rows.get("average", rows["weight"])}, keys)
    return Trained(run, store, model.eval(), table, reader)


@dataclass(frozen=True)
class Known:
    """What a hub folder knows of a store's sources.

    Attributes:
        unknown: which rows of the store's table it does not know (R,).
        matched: what was taken for something else, or is missing, as lines of text.
        rows: all rows of the hub's own table (K, E).
        modality: of each of them (K,), an index into the model's MODALITIES.
    """

    unknown: npt.NDArray[np.bool_]
    matched: list[str]
    rows: torch.Tensor
    modality: torch.Tensor


def open_hub(hub: Path, store: Store) -> tuple[Trained, Known]:
    """The model with the rows of this store's sources, as far as it knows them; the others are zero.

    A session or subject that it does not know has no row at all: nothing is inferred of it, and nothing fitted.
    """
    weight_files(hub)
    with weights_that_fit(hub):
        model = BrainloomForPreTraining.from_pretrained(hub).eval().requires_grad_(False)
    processor = BrainloomProcessor.from_pretrained(hub)
    shape = model.config
    run = config.RunConfig(data=config.DataConfig(context_s=shape.context_s))
    reader = WindowReader(store, shape, run.data.max_frames, set(processor.unit_keys))
    table = UnitTable(reader.source_table.keys, shape.unit_embed_size, torch.device("cpu"))
    table.weight.zero_()
    unknown, matched = take_known_rows(table, set(reader.source_table.channel_keys), processor)
    known = Known(unknown, matched, processor.units["weight"], processor.units["modality"])
    return Trained(run, store, model, table, reader), known


def take_known_rows(
    table: UnitTable, channels: set[str], processor: BrainloomProcessor
) -> tuple[npt.NDArray[np.bool_], list[str]]:
    """Rows by key; a channel that is known from another session by dataset and name, else by its name alone."""
    exact = {key: row for row, key in enumerate(processor.unit_keys)}
    modality = processor.units["modality"].tolist()
    with_tokens = {key: row for key, row in exact.items() if modality[row] != SESSION}
    of_dataset = {(key.split("/")[0], *key.split("/")[2:]): row for key, row in with_tokens.items()}
    by_name = {tuple(key.split("/")[2:]): row for key, row in with_tokens.items()}
    unknown, matched = np.zeros(len(table.keys), np.bool_), []
    for number, key in enumerate(table.keys):
        row = exact.get(key)
        if key in channels:
            dataset, *name = key.split("/")
            row = of_dataset.get((dataset, *name))
            if row is None and (row := by_name.get(tuple(name))) is not None:
                matched.append(f"{key} is taken for {processor.unit_keys[row]}, by its name")
            if row is None:
                matched.append(f"{key} is not known: it has no row")
        if row is None:
            unknown[number] = True
        else:
            table.weight[number] = processor.units["weight"][row]
    return unknown, matched


def load_adapted(folder: Path) -> Trained:
    """What `make adapt` has written."""
    report: dict[str, Any] = json.loads((folder / ADAPTED).read_text())
    trained, _ = open_hub(folder / "hub", Store(report["store"]))
    return trained
