"""Checkpoints: fragments by name and offset, unit rows by key, sealed by a manifest; no pickle.

In: an engine at a step. Out: the files of <run>/checkpoints/step-00000100/: per rank, master weights and moments of its
partitions, its rows of the unit table (table_files.py) and its state of chance as safetensors; rank 0's state.json; and
manifest.json, written last: a folder without one is not a checkpoint. train/saving.py writes them beside the training.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from train import chance, table_files
from train.partitions import MASTER

if TYPE_CHECKING:
    from train.engine import Engine

CHECKPOINT_FORMAT = 2
AVERAGE = "average"  # of the master weights over the last steps, where the run keeps one
Files = dict[str, dict[str, Tensor] | str]  # what a rank writes: tensors or text, by file name


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says which file and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A sealed checkpoint, read by name."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps that were done."""
        return int(self.manifest["step"])

    def state(self) -> dict[str, Any]:
        """Position, shapes, resolved configuration."""
        content: dict[str, Any] = json.loads((self.path / "state.json").read_text())
        return content

    def parameter(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flattened parameter, pieced together from the fragments that cover them."""
        whole, covered = torch.empty(stop - start), 0
        for file, offset, size in self._fragments.get((name, kind), []):
            first, last = max(start, offset), min(stop, offset + size)
            if first < last:
                with safe_open(self.path / file, "pt") as opened:
                    part = opened.get_slice(fragment_key(name, kind, offset))[first - offset : last - offset]
                whole[first - start : last - start] = part
                covered += last - first
        if covered != stop - start:
            raise CheckpointError(
                f"{self.path} has {covered} of {stop - start} elements of {name} ({kind}). It is not this model's."
            )
        return whole

    @property
    def has_average(self) -> bool:
        """Was a running average of the weights kept?"""
        return any(kind == AVERAGE for _, kind in self._fragments)

    @cached_property
    def _fragments(self) -> dict[tuple[str, str], list[tuple[str, int, int]]]:
        """File, offset and size of each fragment of a parameter and kind."""
        found: dict[tuple[str, str], list[tuple[str, int, int]]] = {}
        for file, fragments in self.manifest["fragments"].items():
            for key, size in fragments.items():
                name, kind, offset = key.split("|")
                found.setdefault((name, kind), []).append((file, int(offset), size))
        return found

    def table(self) -> tuple[dict[str, Tensor], list[str]]:
        """Unit rows that have moved, of all ranks, and their keys; any other row is drawn from its key."""
        return table_files.merged(self.path)


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.removeprefix("step-"))


def fragment_key(name: str, kind: str, offset: int) -> str:
    """What a fragment is called in its file."""
    return f"{name}|{kind}|{offset}"


def files_of(
    engine: "Engine", state: dict[str, Any], full_step: int, to_host: Callable[[str, Tensor], Tensor]
) -> Files:
    """What this rank writes of an engine; `to_host(name, tensor)` copies a tensor that training goes on to change.

    Of the unit table, the rows that have moved since the full save of `full_step`.
    """
    rank = dist.get_rank()
    files: Files = {
        f"rank-{rank:05d}.safetensors": _fragments_of(engine, to_host),
        f"chance-{rank:05d}.safetensors": chance.state(),
        table_files.file_name(state["step"], rank): table_files.moved_rows(engine.table, full_step),
    }
    return {**files, **_shared_files(engine, state)} if rank == 0 else files


def _fragments_of(engine: "Engine", to_host: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    """This rank's part of each parameter, its moments and average, by `name|kind|offset`; without the padding."""
    fragments = {}
    for number, buffer in enumerate(engine.partitions.buffers()):
        buffer |= {AVERAGE: engine.average[number]} if engine.average else {}
        for kind, flat in buffer.items():
            host = to_host(f"{kind} {number}", flat)
            for piece in engine.partitions.pieces[number]:
                key = fragment_key(piece.name, kind, piece.start)
                fragments[key] = host[piece.place : piece.place + piece.size]
    return fragments


def _shared_files(engine: "Engine", state: dict[str, Any]) -> Files:
    numbers = {"optimizer_steps": engine.partitions.num_steps, "world_size": dist.get_world_size()}
    content = {**state, **numbers, "shapes": engine.partitions.shapes}
    return {
        "config.json": engine.model.config.to_json_string(),
        "state.json": json.dumps(content, indent=1, sort_keys=True),
    }


def entry_of(path: Path) -> dict[str, Any]:
    """What a manifest says of a file that is on disk for good."""
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def seal(folder: Path, step: int, known: dict[str, Any] | None = None) -> None:
    """Write the manifest: every file with size and digest, `known` for some, and where each fragment lies."""
    files, fragments = {}, {}
    for path in sorted(folder.iterdir()):
        files[path.name] = (known or {}).get(path.name) or entry_of(path)
        if path.name.startswith("rank-"):
            with safe_open(path, "pt") as opened:
                fragments[path.name] = {key: opened.get_slice(key).get_shape()[0] for key in opened.keys()}  # noqa: SIM118  no dict
    content = {"format": CHECKPOINT_FORMAT, "step": step, "files": files, "fragments": fragments}
    content["sha256"] = _digest_of(content)
    temporary = folder / ".manifest.json"
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True))
    sync(temporary)
    temporary.rename(folder / "manifest.json")
    sync(folder)


def newest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest sealed and undamaged checkpoint, and what was passed over."""
    passed_over: list[str] = []
    for folder in sorted(root.glob("step-*"), reverse=True):
        try:
            return open_checkpoint(folder), passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
    return None, passed_over


def newest_of_run(run_dir: Path) -> Checkpoint:
    """The newest sealed and undamaged checkpoint of a run.

    Raises:
        CheckpointError: there is none.
    """
    found, passed_over = newest(run_dir / "checkpoints")
    if found is None:
        raise CheckpointError(
            f"{run_dir / 'checkpoints'} has no sealed checkpoint ({len(passed_over)} damaged). "
            f"Train first: make train OUT={run_dir}"
        )
    return found


def newest_of_all_ranks(root: Path, up_to_step: float = math.inf) -> tuple[Checkpoint | None, list[str]]:
    """`newest` of a step or before, for ranks that must agree; each verifies its share of the files."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    listed = [[path.name for path in sorted(root.glob("step-*"), reverse=True) if step_of(path) <= up_to_step]]
    dist.broadcast_object_list(listed)
    passed_over: list[str] = []
    for name in listed[0]:
        found, problem = None, ""
        try:
            found = open_checkpoint(root / name, slice(rank, None, num_ranks))
        except CheckpointError as error:
            problem = str(error)
        problems = [""] * num_ranks
        dist.all_gather_object(problems, problem)
        if not any(problems):
            return found, passed_over
        passed_over.append(next(filter(None, problems)))
    return None, passed_over


def open_checkpoint(folder: Path, share: slice = slice(None)) -> Checkpoint:
    """Open and verify a checkpoint: it is sealed, and every file, or a share of them, is what was sealed."""
    manifest_path = folder / "manifest.json"
    if not manifest_path.exists():
        raise CheckpointError(f"{folder} has no manifest.json: it was never sealed. Use an earlier checkpoint.")
    try:
        manifest = json.loads(manifest_path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{manifest_path} is damaged ({error}). Use an earlier checkpoint.") from error
    if manifest.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{folder} is checkpoint format {manifest.get('format')}; this code reads [{CHECKPOINT_FORMAT}]. "
            "Update the code."
        )
    if manifest.get("sha256") != _digest_of(manifest):
        raise CheckpointError(f"{manifest_path} is damaged (differs from its own digest). Use an earlier checkpoint.")
    for name, recorded in [*manifest["files"].items()][share]:
        path = folder / name
        if not path.exists() or path.stat().st_size != recorded["bytes"] or _sha256(path) != recorded["sha256"]:
            raise CheckpointError(
                f"{path} is missing or damaged (differs from the manifest). Use an earlier checkpoint."
            )
    return Checkpoint(folder, manifest)


def restore(engine: "Engine", checkpoint: Checkpoint) -> int:
    """Put master weights, moments, working weights and unit rows back; returns the number of rows that have moved."""
    state, shapes, pieces = checkpoint.state(), engine.partitions.shapes, engine.partitions.pieces
    if shapes != state["shapes"]:
        odd = sorted(name for name in {*shapes, *state["shapes"]} if shapes.get(name) != state["shapes"].get(name))
        raise CheckpointError(
            f"{checkpoint.path} is another model's: {odd[0]} is {state['shapes'].get(odd[0])} there and "
            f"{shapes.get(odd[0])} here. "
            "Use the run's own configuration, or another OUT."
        )
    # A run that begins to average begins with the weights themselves.
    average_of = AVERAGE if checkpoint.has_average else MASTER
    for number, buffer in enumerate(engine.partitions.refill(int(state["optimizer_steps"]))):
        targets = [(kind, flat) for kind, flat in buffer.items()]
        targets += [(average_of, engine.average[number].zero_())] if engine.average else []
        for piece in pieces[number]:
            for kind, flat in targets:
                values = checkpoint.parameter(piece.name, kind, piece.start, piece.start + piece.size)
                flat[piece.place : piece.place + piece.size] = values
    chance.restore(checkpoint.path)
    engine.table.reset()  # a spike that is undone has moved rows that had not moved at the checkpoint
    for rows, keys in table_files.parts(checkpoint.path):  # one file at a time: a rank's memory is its own rows'
        engine.table.load(rows, keys)
    engine.table.saved_in = checkpoint.path, checkpoint.step
    num_rows = (engine.table.state()["moved_at"] > 0).sum()
    dist.all_reduce(num_rows)
    return int(num_rows)


def prune(root: Path, keep: int, keep_every: int = 0) -> None:
    """Keep the newest checkpoints, one of them apart from the newest, and those of every `keep_every` steps."""
    sealed = sorted(path for path in root.glob("step-*") if (path / "manifest.json").exists())
    kept = {*sealed[-keep:], *(table_files.apart(sealed)[-1:] if sealed and keep > 1 else [])}
    for folder in sealed:
        if folder not in kept and (not keep_every or step_of(folder) % keep_every):
            shutil.rmtree(folder)


def full_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All weights of a checkpoint, whole, in fp32, or their average: for export and evaluation."""
    state, kind = checkpoint.state(), AVERAGE if checkpoint.has_average else MASTER
    weights = {}
    for name, shape in state["shapes"].items():
        size = int(torch.Size(shape).numel())
        weights[name] = checkpoint.parameter(name, kind, 0, size).reshape(shape)
    return weights


def _digest_of(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on disk for good."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
