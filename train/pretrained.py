"""A run that begins with what a published model has learned: full fine-tuning, where `make adapt` moves rows alone.

In: a hub folder; an engine that has done no step, on every rank. Out: its master weights, their average, and the rows
of sources that the folder knows; moments are zero. Rows of other sources are drawn from their keys, as in any run.
"""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from prep.settings import ConfigError
from train.build import model_config
from train.config import RunConfig
from train.model.configuration_brainloom import BrainloomConfig
from train.model.modeling_brainloom import BrainloomForPreTraining
from train.model.processing_brainloom import BrainloomProcessor
from train.partitions import MASTER
from train.sources import SourceTable
from train.trained import take_known_rows, weight_files

if TYPE_CHECKING:
    from train.engine import Engine

# What a run may choose anew: the length of its windows, and what only training asks about.
OWN = {"context_s", "hidden_dropout", "population_dropout", "modality_weights", "scale_tempering", "initializer_range"}


class Weights:
    """The weights of a hub folder, in one file or several, one parameter at a time."""

    def __init__(self, hub: Path) -> None:
        """Read the names and shapes; raises ConfigError where it is no hub folder."""
        self.shapes: dict[str, list[int]] = {}
        self._files: dict[str, Path] = {}
        for path in weight_files(hub):
            with safe_open(path, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  no dict
                    self.shapes[name] = opened.get_slice(name).get_shape()
                    self._files[name] = path

    def read(self, name: str) -> Tensor:
        """A parameter, flat, in fp32."""
        with safe_open(self._files[name], "pt") as opened:
            whole: Tensor = opened.get_tensor(name)
        return whole.float().flatten()


def check(hub: Path, run: RunConfig) -> None:
    """Refuse a folder whose model is not the run's.

    Raises:
        ConfigError: it is no hub folder, or of another architecture or version; says which keys or weights differ.
    """
    weights = Weights(hub)
    theirs, ours = BrainloomConfig.from_pretrained(hub), model_config(run)
    if odd := differing(theirs, ours):
        described = ", ".join(f"{key} {getattr(theirs, key)} (here {getattr(ours, key)})" for key in odd)
        raise ConfigError(
            f"{hub} holds another model than this run's: {described}. Set these keys under model.overrides of the run, "
            "or leave --hub out."
        )
    with torch.device("meta"):
        expected = {name: list(p.shape) for name, p in BrainloomForPreTraining(ours).named_parameters()}
    different = sorted(name for name in {*expected, *weights.shapes} if expected.get(name) != weights.shapes.get(name))
    if different:
        name = different[0]
        raise ConfigError(
            f"{hub} was written by another version: {name} is {weights.shapes.get(name)} there and "
            f"{expected.get(name)} here ({len(different)} differ). Use that version, or leave --hub out."
        )


def differing(theirs: BrainloomConfig, ours: BrainloomConfig) -> list[str]:
    """Keys of the architecture in which two configurations differ."""
    keys = [key for key in inspect.signature(BrainloomConfig).parameters if key not in {*OWN, "kwargs"}]
    return [key for key in keys if getattr(theirs, key) != getattr(ours, key)]


def begin(engine: "Engine", hub: Path, sources: SourceTable) -> int:
    """Put weights and known rows into an engine; every rank calls it. Returns the number of rows that were known."""
    weights, pieces = Weights(hub), engine.partitions.pieces
    for number, buffer in enumerate(engine.partitions.refill(0)):
        targets = [buffer[MASTER], *engine.average[number : number + 1]]
        for piece in pieces[number]:
            values = weights.read(piece.name)[piece.start : piece.start + piece.size]
            for flat in targets:
                flat[piece.place : piece.place + piece.size] = values
    table = engine.table
    unknown, _ = take_known_rows(table, set(sources.channel_keys), BrainloomProcessor.from_pretrained(hub))
    known = torch.from_numpy(~unknown).to(table.weight.device)
    state = table.state()
    state["moved_at"][known] = 1  # they are not what their keys say: a checkpoint has to hold them
    if "average" in state:
        state["average"][known] = state["weight"][known]
    num_rows = known.sum()
    dist.all_reduce(num_rows)
    return int(num_rows)
