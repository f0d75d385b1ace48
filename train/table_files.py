"""The unit table on disk: the rows of each rank by key, and of those only what has moved since a full save.

In: a table, and the checkpoint that it was last saved in. Out: units-<step>-<rank>.safetensors, merged when read.

A full save has every row that ever moved: any other is drawn from its key. A later checkpoint has the files of the full
save as hard links, and the rows that moved after it in files of its own step. So each folder is whole by itself, and
an older one may be removed. What two checkpoints share is lost together, which is why `apart` tells `prune` of others.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from train.unit_table import UnitTable

KEYS = "keys"  # beside the rows: their keys, as JSON in UTF-8


def file_name(step: int, rank: int) -> str:
    """Of the rows that one rank saves at a step."""
    return f"units-{step:08d}-{rank:05d}.safetensors"


def pack(state: dict[str, Tensor], keys: list[str]) -> dict[str, Tensor]:
    """The content of a file, on the host."""
    text = bytearray(json.dumps(keys).encode())
    return {name: tensor.cpu() for name, tensor in state.items()} | {KEYS: torch.frombuffer(text, dtype=torch.uint8)}


def moved_rows(table: UnitTable, since: int) -> dict[str, Tensor]:
    """What this rank saves: its rows that have moved after the step `since`, copied to the host."""
    moved = (table.state()["moved_at"] > since).nonzero().flatten()
    keys = [table.keys[row] for row in moved.tolist()]
    return pack({name: tensor[moved] for name, tensor in table.state().items()}, keys)


def full_save(table: UnitTable) -> int:
    """Step of the full save that suffices with what has moved since, 0 where it is better to save all again.

    The same on all ranks, which all call it: rows since then are fewer than half of what a full save would have.
    """
    device = table.weight.device
    step = torch.tensor(_full_step(table), device=device)
    dist.broadcast(step, 0)  # what is on disk, one rank says
    moved_at = table.state()["moved_at"]
    counts = torch.stack([(moved_at > step).sum(), (moved_at > 0).sum()])
    dist.all_reduce(counts)
    since, ever = counts.tolist()
    return int(step) if 2 * since < ever else 0


def link_full_save(saved_in: Path | None, step: int, folder: Path) -> dict[str, Any]:
    """Put the files of the full save of a step, which `saved_in` has, into a new checkpoint; their entries there.

    The digests are those of the full save: were the files read again, damage since then would be sealed as sound.
    """
    if step == 0:
        return {}
    assert saved_in is not None
    manifest = json.loads((saved_in / "manifest.json").read_text())
    entries = {name: entry for name, entry in manifest["files"].items() if name.startswith(f"units-{step:08d}-")}
    for name in entries:
        try:
            os.link(saved_in / name, folder / name)
        except OSError:  # a file system without links
            shutil.copyfile(saved_in / name, folder / name)
    return entries


def parts(folder: Path) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
    """Rows and keys of each file of a checkpoint, the full save first: rows that come again take their place."""
    for path in sorted(folder.glob("units-*.safetensors")):
        state = load_file(path)
        yield state, json.loads(bytes(state.pop(KEYS).numpy()))


def merged(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """All rows of a checkpoint, as one table."""
    states, lists = zip(*parts(folder), strict=True)
    last = {key: row for row, key in enumerate(key for keys in lists for key in keys)}
    chosen = torch.tensor(list(last.values()), dtype=torch.int64)
    # Where the full save kept no average and the newest files do, the average begins with the rows themselves.
    columns = {name: torch.cat([state.get(name, state["weight"]) for state in states]) for name in states[-1]}
    return {name: column[chosen] for name, column in columns.items()}, list(last)


def apart(sealed: list[Path]) -> list[Path]:
    """Those checkpoints which share no file of the table with the newest, the last of `sealed`."""
    shared = _names(sealed[-1])
    return [folder for folder in sealed if not shared & _names(folder)]


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("units-*.safetensors")}


def _full_step(table: UnitTable) -> int:
    """Step of the full save in the checkpoint that the table was last saved in, where it is still there; 0: none."""
    if table.saved_in is None or not (table.saved_in[0] / "manifest.json").exists():
        return 0
    return min((int(name.split("-")[1]) for name in _names(table.saved_in[0])), default=0)
