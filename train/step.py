"""One optimizer step, and what metrics.jsonl keeps of it.

In: an engine, the batches of a rank. Out: a row that is the same on all ranks but for times, and the windows' losses.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train import usage
from train.engine import Engine
from train.loader import Feed, to_device
from train.modalities import PREDICTED
from train.schedule import lr_factor


def take_step(
    engine: Engine, feed: Feed, per_step: int, step: int, stop_requested: Callable[[], bool]
) -> tuple[dict[str, Any], Tensor, bool]:
    """Read `per_step` micro-batches and train on them.

    Returns the row, nats and values of this rank's windows (2, W, M), and whether any rank was asked to stop.
    """
    began_s = time.perf_counter()
    engine.timer.seconds()  # what lies between two steps is of neither
    with engine.timer.phase("data_wait"):
        micro_batches = [to_device(next(feed), engine.device) for _ in range(per_step)]
    used = usage.of_step(micro_batches, engine.config.turn(step).context_s, engine.model.config)
    loss, windows = engine.train_step(micro_batches, step)
    nats, values = windows.sum(1)
    mine = {"loss": float(loss), "stop": float(stop_requested()), "skipped_windows": float(len(feed.skipped)), **used}
    mine |= {f"nats_{name}": float(total) for name, total in zip(PREDICTED, nats, strict=True)}
    mine |= {f"num_{name}": float(count) for name, count in zip(PREDICTED, values, strict=True)}
    total = _sum_over_ranks(mine, engine.device)
    phases, seconds = engine.timer.seconds(), time.perf_counter() - began_s
    return _row(engine, step, total, seconds, phases), windows.to(engine.device), bool(total["stop"])


def _sum_over_ranks(mine: dict[str, float], device: torch.device) -> dict[str, float]:
    shared = torch.tensor(list(mine.values()), dtype=torch.float64, device=device)  # NCCL reduces nothing on the host
    dist.all_reduce(shared)
    return dict(zip(mine, shared.tolist(), strict=True))


def _row(
    engine: Engine, step: int, total: dict[str, float], seconds: float, phases: dict[str, float]
) -> dict[str, Any]:
    """A step as metrics.jsonl keeps it: sums over ranks; times and memory are rank 0's."""
    train, num_ranks = engine.config.train, dist.get_world_size()
    row: dict[str, Any] = {
        "step": step,
        "family": train.families[step % len(train.families)],
        "loss": total["loss"] / num_ranks,
        "lr": train.lr * lr_factor(step, train),
        "tokens_per_s": total["tokens"] / seconds,
        "unit_hours": total["unit_hours"],
        "flops": total["flops"],
        "seconds": seconds,
        **{f"{name}_s": time_s for name, time_s in phases.items()},
        "data_wait_share": phases["data_wait"] / seconds,
        "peak_memory_bytes": usage.peak_memory_bytes(engine.device),
        "skipped_windows": int(total["skipped_windows"]),
    }
    norm, peak = engine.gradient_norm(), usage.peak_flops(engine.config, engine.device)
    if norm is not None:
        row["gradient_norm"] = norm
    if peak is not None:
        row["mfu"] = total["flops"] / seconds / (peak * num_ranks)
    for name in PREDICTED:
        if total[f"num_{name}"]:
            row[f"nats_{name}"] = total[f"nats_{name}"] / total[f"num_{name}"]
    return row
