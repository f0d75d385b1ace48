"""An all-reduce between every pair of hosts: `python -m train doctor-pairs`, one process on each host.

In:  a `Task` as JSON on stdin. Out: a line of JSON for each pair in which this host comes first: how fast, or why not.
In each round every host is in one pair at most, so that no pair disturbs another more than a run would.

A large all-reduce says the bandwidth: of n bytes between two, each of them sends n. Many small all-gathers, begun
before any has ended as ZeRO-3 does it, say the latency: what each of them takes beside its bytes (train/traffic.py).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # where they are: torch.distributed re-exports them

from train.doctor_probe import MARK

NUM_FLOATS = 4 * 2**20
NUM_REPEATS = 3
NUM_GATHERS, GATHERED_FLOATS, NUM_SMALL_REPEATS = 32, 2**14, 10
PAIR_S = 30.0  # one pair, with its rendezvous
START_S = 60.0  # until all hosts are there


@dataclass(frozen=True, kw_only=True)
class Task:
    """Which of the hosts this is, where they meet, and the interface that Gloo and NCCL take (\"\": as they like)."""

    rank: int
    names: list[str]
    address: str
    port: int
    interface: str
    use_gpu: bool


def rounds(number: int) -> list[list[tuple[int, int]]]:
    """Every pair of `number` hosts once, in rounds in which no host is twice (the circle of a tournament)."""
    players = [*range(number), *([-1] * (number % 2))]
    found = []
    for _ in range(len(players) - 1):
        pairs = [sorted((players[i], players[-1 - i])) for i in range(len(players) // 2)]
        found.append([(a, b) for a, b in pairs if a >= 0])
        players = [players[0], players[-1], *players[1:-1]]
    return found


def time_limit_s(number: int) -> float:
    """How long the whole may take on `number` hosts."""
    return 3 * START_S + 2 * PAIR_S * len(rounds(number))


def _meet(task: Task) -> tuple[Store, list[int]]:
    """The store that the first host serves, and the hosts that have come to it, as the first host counts them."""
    timeout = datetime.timedelta(seconds=START_S)
    store = TCPStore(task.address, task.port, is_master=task.rank == 0, timeout=timeout, wait_for_workers=False)
    store.set(f"here-{task.rank}", "")
    if task.rank == 0:
        deadline_s = time.monotonic() + START_S
        came = [rank for rank in range(len(task.names)) if _comes(store, [f"here-{rank}"], deadline_s)]
        store.set("came", json.dumps(came))
    store.wait(["came"], 2 * timeout)
    return store, json.loads(store.get("came"))


def _comes(store: Store, keys: list[str], deadline_s: float) -> bool:
    """Wait until the keys are set; False where they are not in time, or the store has gone."""
    try:
        store.wait(keys, datetime.timedelta(seconds=max(0.1, deadline_s - time.monotonic())))
    except RuntimeError:  # torch's, for both
        return False
    return True


def _speed(task: Task, store: Store, pair: tuple[int, int]) -> dict[str, float]:
    """Of a way between two: `gbit_s`, of what each of them sends while it receives as much, and `latency_us`."""
    dist.init_process_group(
        "nccl" if task.use_gpu else "gloo",
        store=PrefixStore(f"{pair[0]}-{pair[1]}", store),
        rank=pair.index(task.rank),
        world_size=2,
        timeout=datetime.timedelta(seconds=PAIR_S / 2),
    )
    try:
        device = "cuda" if task.use_gpu else "cpu"
        values, own = torch.ones(NUM_FLOATS, device=device), torch.ones(GATHERED_FLOATS // 2, device=device)
        byte_s = _seconds(lambda: dist.all_reduce(values), values, NUM_REPEATS) / values.nbytes
        gathered = [torch.empty(GATHERED_FLOATS, device=device) for _ in range(NUM_GATHERS)]
        gather_s = _seconds(lambda: _gather(gathered, own), gathered[-1], NUM_SMALL_REPEATS) / NUM_GATHERS
    finally:
        dist.destroy_process_group()
    return {"gbit_s": 8 / byte_s / 1e9, "latency_us": 1e6 * max(0.0, gather_s - own.nbytes * byte_s)}


def _gather(gathered: list[torch.Tensor], own: torch.Tensor) -> None:
    """Begin all, then wait for each."""
    for work in [dist.all_gather_into_tensor(whole, own, async_op=True) for whole in gathered]:
        work.wait()


def _seconds(communicate: Callable[[], object], result: torch.Tensor, number: int) -> float:
    """The least of `number` calls: what else a host does only adds. The first has connections to make."""
    found = []
    for _ in range(1 + number):
        began_s = time.perf_counter()
        communicate()
        float(result[0])  # waits for the GPU
        found.append(time.perf_counter() - began_s)
    return min(found[1:])


def _measure(task: Task, store: Store, pair: tuple[int, int], came: list[int]) -> dict[str, Any]:
    result: dict[str, Any] = {"pair": [task.names[index] for index in pair]}
    absent = [task.names[index] for index in pair if index not in came]
    if absent:
        return {**result, "error": f"{absent[0]} did not come to {task.address}:{task.port}"}
    try:
        return {**result, **_speed(task, store, pair)}
    except (RuntimeError, ValueError) as error:  # torch has no narrower ones for a lost peer
        return {**result, "error": str(error).strip().splitlines()[0]}


def reduce_all(task: Task) -> list[dict[str, Any]]:
    """Run this host's pairs; return those in which it comes first, and those that failed.

    All begin a round together: a host that has waited for a lost one must not look lost to its next.
    """
    store, came = _meet(task)
    results = []
    for number, pairs in enumerate(rounds(len(task.names))):
        for pair in (pair for pair in pairs if task.rank in pair):
            result = _measure(task, store, pair, came)
            if task.rank == pair[0] or "error" in result:
                results.append(result)
        store.set(f"done-{number}-{task.rank}", "")
        _comes(store, [f"done-{number}-{rank}" for rank in came], time.monotonic() + PAIR_S)
    return results


def configure(parser: argparse.ArgumentParser) -> None:
    """It has no arguments: the task comes on stdin."""


def main(args: argparse.Namespace) -> int:
    """Run the pairs of this host."""
    task = Task(**json.loads(sys.stdin.read()))
    signal.alarm(int(time_limit_s(len(task.names))))  # whatever happens, this process ends
    if task.interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", task.interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", task.interface)
    print(f"{MARK}{json.dumps(reduce_all(task))}", flush=True)
    return 0
