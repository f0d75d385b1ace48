"""What the task of a shard leaves for the task that finishes the session: digests and statistics, while they are warm.

In: a session's partial folder. Out: `.parts/<name>.npz` in it, read and removed before the seal, so that nothing that
was written is read again.
"""

import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.disk import StoreError, write_bytes

FOLDER = ".parts"
Files = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class ShardPart:
    """Of one shard."""

    files: Files  # path from the session's folder: bytes, sha256
    arrays: dict[str, npt.NDArray[Any]]  # statistics, or what else is known once the shard is read


def write_part(partial: Path, name: str, files: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Leave a part under a name of its own."""
    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps(dict(files)).encode(), np.uint8)
    np.savez(buffer, **{"files.json": text, **arrays})  # type: ignore[arg-type]  # numpy's own flag allow_pickle stands among the arrays
    write_bytes(partial / FOLDER / f"{name}.npz", buffer.getbuffer(), is_kept=False)


def read_part(partial: Path, name: str) -> ShardPart:
    """A part by its name. Raises StoreError where its task has not run."""
    path = partial / FOLDER / f"{name}.npz"
    if not path.exists():
        raise StoreError(f"{path} is missing: a shard was not written. Run the same `make prep` again.")
    with np.load(path, allow_pickle=False) as content:
        arrays = dict(content)
    return ShardPart(files=json.loads(arrays.pop("files.json").tobytes()), arrays=arrays)


def has_part(partial: Path, name: str) -> bool:
    """Whether a part of this name was left."""
    return (partial / FOLDER / f"{name}.npz").exists()


def remove_parts(partial: Path) -> None:
    """Remove all parts, before the seal."""
    shutil.rmtree(partial / FOLDER, ignore_errors=True)
