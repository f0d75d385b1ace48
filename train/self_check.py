"""The start-up self-check: ranks that differ are named before the first step, by whom and in what.

In: what each rank found out about itself, as lines of text by topic. Out: nothing, or SelfCheckError on every rank.
Ranks talk by the key-value store of the rendezvous, with a time-out: a collective would wait for who never comes.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import os
import platform
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # documented, but not marked so

from train.build import Gather
from train.config import RunConfig, deepspeed_config

Topics = dict[str, list[str]]
LEAVING = timedelta(seconds=5)
PACKAGES = ("torch", "deepspeed", "transformers", "numpy")
REMEDY = {  # by topic
    "versions": "Install the same on every host: make install",
    "code": "Bring all hosts to the same revision",
    "configuration": "Every host must see the same run folder and the same ds_configs",
    "store": "Every host must see the same store",
    "start": "Every host must see the same checkpoints",
    "weights": "Start again; if it comes back, that host's memory or network is not to be trusted",
}
EVERY_BRANCH = (
    "A branch of the model depends on the rank or its data; under ZeRO-3 that hangs, or computes with the weights of "
    "another module. Every rank must run every branch, on dummy input times 0 where there is nothing"
)


class SelfCheckError(ValueError):
    """Ranks differ, or did not come; the message names them."""


class Peers:
    """The ranks of a run, as far as the key-value store of their rendezvous shows them."""

    def __init__(self, rank: int, world_size: int, patience_s: float) -> None:
        """`patience_s`: how long a rank waits for another. Raises SelfCheckError where rank 0 cannot be reached."""
        self.rank, self.world_size, self._patience = rank, world_size, timedelta(seconds=patience_s)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            # The same as torch.distributed is about to open: whoever comes second in a process shares the first's.
            store = TCPStore(
                address, port, world_size, rank == 0, self._patience, wait_for_workers=False, multi_tenant=True
            )
        except dist.DistError as error:
            raise SelfCheckError(
                f"rank {rank}: rank 0 does not answer at {address}:{port} within {patience_s:g} s. See its log, and "
                f"whether this host reaches that one ({str(error).splitlines()[0]})."
            ) from error
        self._store, self._num_checks = PrefixStore("brainloom", store), 0

    def agree(self, topics: Topics) -> None:
        """All ranks call it; each raises the same SelfCheckError where they differ, or where one does not come."""
        self._num_checks += 1
        mine, verdict = f"{self._num_checks}/rank/", f"{self._num_checks}/verdict"
        self._store.set(f"{mine}{self.rank}", _pack(topics))
        if self.rank == 0:
            self._store.set(verdict, self._judge(mine))
        said = self._get(verdict, 2 * self._patience)  # rank 0 itself waits for the others
        if said is None:
            raise SelfCheckError(f"rank {self.rank}: rank 0 does not answer any more. See its log.")
        if said:
            self._leave_together(f"{self._num_checks}/heard/")
            raise SelfCheckError(said.decode())

    def _leave_together(self, heard: str) -> None:
        """Rank 0 serves the store: it is the last to go, but waits for nobody who does not come."""
        self._store.set(f"{heard}{self.rank}", "")
        if self.rank == 0:
            with contextlib.suppress(dist.DistError):  # somebody did not come
                self._store.wait([f"{heard}{rank}" for rank in range(self.world_size)], LEAVING)

    def _judge(self, prefix: str) -> str:
        deadline_s = time.monotonic() + self._patience.total_seconds()  # of all of them together
        packed = {}
        for rank in range(self.world_size):
            left = timedelta(seconds=max(0.1, deadline_s - time.monotonic()))
            packed[rank] = self._get(f"{prefix}{rank}", left)
        missing = [rank for rank, content in packed.items() if content is None]
        if missing:
            return (
                f"{_ranks(missing)} of {self.world_size} did not come to the start-up self-check within "
                f"{self._patience.total_seconds():g} s. See the logs of these ranks, and their hosts."
            )
        return differences({rank: _unpack(content or b"") for rank, content in packed.items()})

    def _get(self, key: str, patience: timedelta) -> bytes | None:
        try:
            self._store.wait([key], patience)
        except dist.DistError:  # nobody has said it in time: the caller says who
            return None
        return bytes(self._store.get(key))


def differences(found: dict[int, Topics]) -> str:
    """What to say where ranks differ, topic by topic: the odd ranks, their first odd line, that of most; else ""."""
    said = []
    for topic in dict.fromkeys(topic for topics in found.values() for topic in topics):
        groups: dict[tuple[str, ...], list[int]] = {}
        for rank, topics in found.items():
            groups.setdefault(tuple(topics.get(topic, ())), []).append(rank)
        if len(groups) > 1:
            said.append(f"{_compare(topic, groups)}. {REMEDY.get(topic, EVERY_BRANCH)}.")
    return "\n".join(["the start-up self-check found ranks that differ:", *said]) if said else ""


def _compare(topic: str, groups: dict[tuple[str, ...], list[int]]) -> str:
    """The ranks that have what most have come last; where there is no most, all are odd."""
    by_size = sorted(groups.items(), key=lambda item: len(item[1]))
    place = next(n for n in itertools.count() if len({lines[n : n + 1] for lines in groups}) > 1)
    told = []
    for lines, ranks in by_size:
        has = f"`{lines[place]}`" if place < len(lines) else "nothing more"
        told.append(f"{_ranks(ranks)} {'have' if len(ranks) > 1 else 'has'} {has}")
    return f"{topic}, line {place + 1}: {', '.join(told)}"


def _pack(topics: Topics) -> str:
    return base64.b64encode(zlib.compress(json.dumps(topics).encode())).decode()


def _unpack(content: bytes) -> Topics:
    topics: Topics = json.loads(zlib.decompress(base64.b64decode(content)))
    return topics


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def surroundings(run: RunConfig, store_digest: str, world_size: int) -> Topics:
    """What a rank can say before there is a model."""
    return {
        "versions": [f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)],
        "code": list(_code()),
        "configuration": [*_flat(asdict(run)), *_flat(deepspeed_config(run, world_size), "ds_config.")],
        "store": [store_digest],
    }


def _code() -> Iterator[str]:
    root = Path(__file__).parents[1]
    for path in sorted(path for part in ("prep", "train") for path in (root / part).rglob("*.py")):
        yield f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key} = {value}"


def weights(model: nn.Module, gather: Gather) -> list[str]:
    """A digest of each parameter and buffer as this rank sees it whole; one module at a time is gathered."""
    lines = []
    for name, module in model.named_modules():
        own = dict(module.named_parameters(name, recurse=False))
        partitioned = [one for one in own.values() if one.numel() != getattr(one, "ds_numel", one.numel())]
        with gather(partitioned) if partitioned else contextlib.nullcontext():
            for key, tensor in [*own.items(), *module.named_buffers(name, recurse=False)]:
                content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
                lines.append(f"{key} {list(tensor.shape)} {tensor.dtype} {hashlib.sha256(content).hexdigest()[:12]}")
    return lines
