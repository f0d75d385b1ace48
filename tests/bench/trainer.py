"""`make bench-trainer`: what the trainer costs beside a loop written by hand, and what a run waits for.

In: presets. Out: a section of tests/bench/RESULTS.md: the time of a step under ZeRO-3 over that of a plain PyTorch loop
with the same weights, batches and optimizer; and of one run of `python -m train train`, the shares of its time that
went into waiting for data and into saves.

The two loops take turns, step by step, in one process and on the same batches, so that whatever else the machine does
meets both; the ratio of a turn is that of the two, and the median of turns is shown. Their first losses must agree, or
they did not do the same work. By hand there is a dense table of rows under Adam where the trainer has its unit table.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
os.environ.setdefault("MASTER_PORT", "29731")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
from bench.science import results
from torch import Tensor
from torch.nn import functional as F

from prep.store import Store
from train import chance, config, unit_table
from train.build import build_model, model_config
from train.dataset import collate
from train.engine import Engine, make_optimizer
from train.loader import TrainingSamples
from train.metrics import read_metrics
from train.sampler import mix
from train.schedule import lr_factor
from train.sources import SourceTable

ROOT = Path(__file__).resolve().parents[2]
LINEAR = F.linear  # DeepSpeed puts another in its place for the whole process
ALLOWED = {"debug": 1.25, "20m": 1.10}  # times the loop by hand, on one CPU process
SAME_LOSS = 1e-4  # of the first step; from then on by hand rows move that a step does not use
RUN_STEPS, SAVE_EVERY = 200, 100
HEAD = ["preset", "P_core", "batch", "by hand, s a step", "trainer, s a step", "ratio", "allowed", "turns"]


class ByHand:
    """The loop that anyone would write: one model, one AdamW, one table of rows under Adam."""

    def __init__(self, run: config.RunConfig, keys: list[str]) -> None:
        self.run, self.model = run, build_model(run)
        self.optimizer = make_optimizer(self.model, run.train)
        size = self.model.config.unit_embed_size
        self.rows = torch.nn.Parameter(unit_table.initial_rows(keys, size))
        self.row_optimizer = torch.optim.Adam([self.rows], betas=unit_table.BETAS, eps=unit_table.EPS)

    def step(self, batch: dict[str, Tensor], step: int) -> float:
        """One optimizer step; returns the loss."""
        train = self.run.train
        factor = lr_factor(step, train)
        for group in self.optimizer.param_groups:
            group["lr"] = train.lr * factor
        self.row_optimizer.param_groups[0]["lr"] = train.unit_lr * factor
        torch.manual_seed(mix(step * train.global_batch_size, self.run.seed))
        arguments = {name: tensor for name, tensor in batch.items() if name != "unit_rows"}
        rows = batch["unit_rows"]
        embeds = F.embedding(rows.clamp(min=0), self.rows) * (rows >= 0)[..., None]
        with mock.patch.object(F, "linear", LINEAR):
            loss = self.model(context_s=self.run.turn(step).context_s, unit_embeds=embeds, **arguments).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.clip_norm)
        for optimizer in (self.optimizer, self.row_optimizer):
            optimizer.step()
            optimizer.zero_grad()
        return float(loss)


def run_of(preset: str, num_steps: int) -> config.RunConfig:
    """The preset's run on one rank of a CPU: fp32, one of its micro-batches a step."""
    run = config.load(ROOT / "train" / "configs" / f"{preset}.yaml")
    train = replace(
        run.train,
        global_batch_size=run.train.micro_batch_size,
        num_steps=num_steps,
        precision="fp32",
        warmup_steps=5,
    )
    data = replace(run.data, num_workers=0, max_units=64)
    return replace(run, ds_config=str(ROOT / run.ds_config), train=train, data=data)


def take_turns(preset: str, store: Path, num_turns: int) -> list[str]:
    """A row of the table."""
    run = run_of(preset, num_turns)
    batch = run.train.micro_batch_size
    chance.seed_everything(run.seed)
    samples = TrainingSamples(store, run, model_config(run))
    keys = SourceTable(Store(store)).keys
    engine, by_hand = Engine(run, keys, 1), ByHand(run, keys)
    seconds: dict[str, list[float]] = {"by hand": [], "trainer": []}
    for step in range(num_turns):
        whole = collate([samples[step * batch + place] for place in range(batch)])
        losses = {}
        for name in ("by hand", "trainer") if step % 2 else ("trainer", "by hand"):
            began = time.perf_counter()
            if name == "trainer":
                losses[name] = float(engine.train_step([whole], step)[0])
            else:
                losses[name] = by_hand.step(whole, step)
            seconds[name].append(time.perf_counter() - began)
        if step == 0 and abs(losses["trainer"] - losses["by hand"]) > SAME_LOSS:
            raise SystemExit(f"{preset}: the loops do not do the same work, their first losses are {losses}")
    ratios = [ours / theirs for theirs, ours in zip(*seconds.values(), strict=True)][num_turns // 5 :]
    hand_s, ours_s = (statistics.median(times) for times in seconds.values())
    print(f"{preset}: {statistics.median(ratios):.3f}", flush=True)
    return [
        preset,
        f"{engine.num_parameters:,}",
        str(batch),
        f"{hand_s:.3f}",
        f"{ours_s:.3f}",
        f"{statistics.median(ratios):.2f}",
        f"{ALLOWED[preset]:.2f}",
        str(len(ratios)),
    ]


def whole_run(store: Path, out: Path) -> str:
    """What a run of the debug preset says of itself: shares of its time."""
    call("hostfile", "--nodes", "localhost", "--slots", "1", "--out", out / "hostfile")
    more = (f"train.num_steps={RUN_STEPS}", f"checkpoint_every={SAVE_EVERY}", "data.num_workers=0")
    source = ("--config", ROOT / "train" / "configs" / "debug.yaml", "--store", store, "--hostfile", out / "hostfile")
    call("train", *source, "--out", out / "run", *more)
    rows = read_metrics(out / "run")[RUN_STEPS // 10 :]
    total_s = sum(row["seconds"] for row in rows)
    waited = sum(row["seconds"] * row["data_wait_share"] for row in rows) / total_s
    log = (out / "run" / "logs" / "rank-00000.log").read_text()
    saved = sum(float(waited_s) for waited_s in re.findall(r"training waited ([\d.]+) s", log)) / total_s
    return (
        f"One run of {RUN_STEPS} steps of debug, saved every {SAVE_EVERY}: waiting for data {waited:.1%} of its "
        f"time (allowed 2 %), stalled by saves {saved:.1%} (allowed 1 %)."
    )


def call(*arguments: object) -> None:
    """A command of train."""
    subprocess.run([sys.executable, "-m", "train", *map(str, arguments)], cwd=ROOT, check=True)


def make_store(out: Path) -> Path:
    """A store of synthetic recordings."""
    store = out / "store"
    if not (store / "catalog.json").exists():
        for step in (
            ("synthesize", "--preset", "demo", "--out", out / "nwb"),
            ("ingest", out / "nwb", "--out", store, "--dataset", "bench"),
        ):
            subprocess.run([sys.executable, "-m", "prep", *map(str, step)], cwd=ROOT, check=True)
    return store


def main() -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench-trainer")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--presets", nargs="+", default=list(ALLOWED))
    args = parser.parse_args()
    store = make_store(args.out)
    deepspeed.init_distributed("gloo", verbose=False)
    rows = [take_turns(preset, store, args.turns) for preset in args.presets]
    text = "\n\n".join(
        [
            "# What the trainer costs",
            f"`make bench-trainer`, {date.today().isoformat()}. Written by the run; do not edit. "
            f"torch {version('torch')}, deepspeed {version('deepspeed')}; {torch.get_num_threads()} thread(s), fp32, "
            "ZeRO-3 on one CPU process.",
            results.table(HEAD, rows),
            whole_run(store, args.out),
        ]
    )
    results.write_section(ROOT / "tests" / "bench" / "RESULTS.md", "make bench-trainer", text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
