"""Checkpoints: fragments by name and offset, unit rows by key, sealed by a manifest; no pickle.

In: an engine at a step. Out: <run>/checkpoints/step-00000100/ with, per rank, master weights and moments of its
partitions and its rows of the unit table (table_files.py) as safetensors, rank 0's state.json, and manifest.json,
written last: a folder without one is not a checkpoint.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from train import table_files

if TYPE_CHECKING:
    from train.engine import Engine

CHECKPOINT_FORMAT = 2
MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "average"  # of the master weights over the last steps, where the run keeps one


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
        for file, key, offset, size in self._fragments(name, kind):
            first, last = max(start, offset), min(stop, offset + size)
            if first < last:
                with safe_open(self.path / file, "pt") as opened:
                    whole[first - start : last - start] = opened.get_slice(key)[first - offset : last - offset]
                covered += last - first
        if covered != stop - start:
            raise CheckpointError(
                f"{self.path} has {covered} of {stop - start} elements of {name} ({kind}). It is not this model's."
            )
        return whole

    @property
    def has_average(self) -> bool:
        """Was a running average of the weights kept?"""
        return any(f"|{AVERAGE}|" in key for keys in self.manifest["fragments"].values() for key in keys)

    def _fragments(self, name: str, kind: str) -> Iterator[tuple[str, str, int, int]]:
        for file, fragments in self.manifest["fragments"].items():
            for key, size in fragments.items():
                its_name, its_kind, offset = key.split("|")
                if (its_name, its_kind) == (name, kind):
                    yield file, key, int(offset), size

    def table(self) -> tuple[dict[str, Tensor], list[str]]:
        """Unit rows that have moved, of all ranks, and their keys; any other row is drawn from its key."""
        return table_files.merged(self.path)


def save(engine: "Engine", root: Path, step: int, state: dict[str, Any]) -> Path:
    """Write and seal a checkpoint; every rank calls it. Returns its folder."""
    final, temporary = root / f"step-{step:08d}", root / f".step-{step:08d}.partial"
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    fragments = local_fragments(engine.model, rank, engine.average)
    save_file(fragments, temporary / f"rank-{rank:05d}.safetensors")
    _sync(temporary / f"rank-{rank:05d}.safetensors")
    full_step = table_files.full_save(engine.table)
    save_file(table_files.moved_rows(engine.table, full_step), temporary / table_files.file_name(step, rank))
    _sync(temporary / table_files.file_name(step, rank))
    if rank == 0:
        _save_shared(engine, temporary, {**state, "step": step, "world_size": world_size})
    dist.barrier()  # sealed only after all ranks are done
    if rank == 0:
        seal(temporary, step, table_files.link_full_save(engine.table, full_step, temporary))
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _sync(root)
    dist.barrier()
    engine.table.saved_in = final
    return final


def partitioned(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Parameters under ZeRO-3 by name; DeepSpeed adds ds_tensor, ds_numel and ds_shape to each."""
    yield from model.named_parameters()


def local_fragments(model: nn.Module, rank: int, average: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's part of each parameter, its moments and average, by `name|kind|offset`; without the padding."""
    from deepspeed.utils import (
        safe_get_local_fp32_param,
        safe_get_local_optimizer_state,
    )  # slow; readers need none of it

    fragments = {}
    for name, parameter in partitioned(model):
        size = parameter.ds_tensor.numel()
        offset, length = rank * size, min(size, parameter.ds_numel - rank * size)
        if length <= 0:
            continue
        tensors = {"master": safe_get_local_fp32_param(parameter)}
        tensors |= {kind: safe_get_local_optimizer_state(parameter, kind) for kind in MOMENTS}
        if name in average:
            tensors[AVERAGE] = average[name]
        for kind, tensor in tensors.items():
            fragments[f"{name}|{kind}|{offset}"] = tensor[:length].detach().float().cpu().clone()
    return fragments


def _save_shared(engine: "Engine", folder: Path, state: dict[str, Any]) -> None:
    shapes = {name: list(parameter.ds_shape) for name, parameter in partitioned(engine.model)}
    (folder / "config.json").write_text(engine.model.config.to_json_string())
    content = {**state, "optimizer_steps": _optimizer_steps(engine), "shapes": shapes}
    (folder / "state.json").write_text(json.dumps(content, indent=1, sort_keys=True))


def _optimizer_steps(engine: "Engine") -> int:
    """Adam's step count; the sub-groups move together, so that there is one number."""
    inner = engine.optimizer.optimizer
    counts = {int(inner.state[flat]["step"]) for flat in engine.optimizer.fp32_partitioned_groups_flat}
    assert len(counts) == 1, f"sub-groups disagree on the number of steps: {counts}"
    return counts.pop()


def seal(folder: Path, step: int, known: dict[str, Any] | None = None) -> None:
    """Write the manifest: every file with size and digest, `known` for some, and where each fragment lies."""
    files, fragments = {}, {}
    for path in sorted(folder.iterdir()):
        _sync(path)
        entry = (known or {}).get(path.name)
        files[path.name] = entry or {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        if path.name.startswith("rank-"):
            with safe_open(path, "pt") as opened:
                fragments[path.name] = {key: opened.get_slice(key).get_shape()[0] for key in opened.keys()}  # noqa: SIM118  no dict
    content = {"format": CHECKPOINT_FORMAT, "step": step, "files": files, "fragments": fragments}
    content["sha256"] = _digest_of(content)
    temporary = folder / ".manifest.json"
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True))
    _sync(temporary)
    temporary.rename(folder / "manifest.json")
    _sync(folder)


def newest(root: Path, up_to_step: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest sealed and undamaged checkpoint, of a step or before, and what was passed over."""
    passed_over: list[str] = []
    for folder in sorted(root.glob("step-*"), reverse=True):
        if up_to_step is not None and int(folder.name.removeprefix("step-")) > up_to_step:
            continue
        try:
            return open_checkpoint(folder), passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
    return None, passed_over


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open and verify a checkpoint: it is sealed, and every file is what was sealed."""
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
    for name, recorded in manifest["files"].items():
        path = folder / name
        if not path.exists() or path.stat().st_size != recorded["bytes"] or _sha256(path) != recorded["sha256"]:
            raise CheckpointError(
                f"{path} is missing or damaged (differs from the manifest). Use an earlier checkpoint."
            )
    return Checkpoint(folder, manifest)


def restore(engine: "Engine", checkpoint: Checkpoint) -> int:
    """Put master weights, moments, working weights and unit rows back; returns the number of rows that have moved."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    rank, state = dist.get_rank(), checkpoint.state()
    shapes = {name: list(parameter.ds_shape) for name, parameter in partitioned(engine.model)}
    if shapes != state["shapes"]:
        odd = sorted(name for name in {*shapes, *state["shapes"]} if shapes.get(name) != state["shapes"].get(name))
        raise CheckpointError(
            f"{checkpoint.path} is another model's: {odd[0]} is {state['shapes'].get(odd[0])} there and "
            f"{shapes.get(odd[0])} here. "
            "Use the run's own configuration, or another OUT."
        )
    _create_moments(engine, int(state["optimizer_steps"]))
    for name, parameter in partitioned(engine.model):
        size = parameter.ds_tensor.numel()
        start, stop = min(rank * size, parameter.ds_numel), min((rank + 1) * size, parameter.ds_numel)
        for kind in ("master", *MOMENTS):
            padded = torch.zeros(size)
            padded[: stop - start] = checkpoint.parameter(name, kind, start, stop)
            if kind == "master":
                safe_set_local_fp32_param(parameter, padded.to(engine.device))
                parameter.ds_tensor.data.copy_(padded)  # the working copy, which the setter leaves as it was
            else:
                safe_set_local_optimizer_state(parameter, padded.to(engine.device), kind)
        if engine.average:  # a run that begins to average begins with the weights themselves
            kept = checkpoint.parameter(name, AVERAGE if checkpoint.has_average else "master", start, stop)
            engine.average[name].zero_()[: stop - start] = kept
    persistent = engine.optimizer.persistent_parameters
    if persistent:  # small parameters stay gathered: refresh them from their partitions
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)
    for rows, keys in table_files.parts(checkpoint.path):  # one file at a time: a rank's memory is its own rows'
        engine.table.load(rows, keys)
    engine.table.saved_in = checkpoint.path
    num_rows = (engine.table.state()["moved_at"] > 0).sum()
    dist.all_reduce(num_rows)
    return int(num_rows)


def _create_moments(engine: "Engine", steps: int) -> None:
    """Adam makes its state at the first step; a resumed run needs it before."""
    inner = engine.optimizer.optimizer
    for flat in engine.optimizer.fp32_partitioned_groups_flat:
        moments = {kind: torch.zeros_like(flat.data) for kind in MOMENTS}
        inner.state[flat] = {"step": torch.tensor(float(steps)), **moments}


def prune(root: Path, keep: int) -> None:
    """Keep the newest checkpoints, one of them apart from the newest; remove older ones and what was never sealed."""
    sealed = sorted(path for path in root.glob("step-*") if (path / "manifest.json").exists())
    kept = {*sealed[-keep:], *(table_files.apart(sealed)[-1:] if sealed and keep > 1 else [])}
    for folder in [*(path for path in sealed if path not in kept), *root.glob(".step-*.partial")]:
        shutil.rmtree(folder)


def full_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All weights of a checkpoint, whole, in fp32, or their average: for export and evaluation."""
    state, kind = checkpoint.state(), AVERAGE if checkpoint.has_average else "master"
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


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
