"""The whole road on one machine: `python -m train demo`, each station a command that anyone can type.

In: nothing. Out: a folder with synthetic NWB files, token store, run, hub folder, picture, predictions, summary.json.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train import evaluate, export, picture
from train.masking import TASKS, task_mask
from train.metrics import read_metrics
from train.trained import Trained, load_trained

CONFIG = Path("train/configs/demo.yaml")
MARKER = ".brainloom-demo"


class DemoError(ValueError):
    """A station failed; the message names it."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the demo."""
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--preset", default="demo", help="which synthetic brain (`python -m prep synthesize --help`)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the synthetic brain")
    parser.add_argument("--slots", type=int, default=2, help="ranks on this machine")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of the run, for instance train.num_steps=100"
    )


def main(args: argparse.Namespace) -> int:
    """Walk the road; print what was found, and where it lies."""
    out: Path = args.out
    _clear(out)
    seconds = {}
    seconds["synthesize"] = station(
        "prep",
        "synthesize",
        "--out",
        out / "nwb",
        "--truth",
        out / "truth",
        "--preset",
        args.preset,
        "--seed",
        args.seed,
    )
    seconds["ingest"] = station("prep", "ingest", out / "nwb", "--out", out / "store", "--dataset", "synthetic")
    seconds["verify"] = station("prep", "verify", out / "store")
    station("train", "hostfile", "--slots", args.slots, "--nodes", "localhost", "--out", out / "hostfile")
    arguments = ["--config", args.config, "--store", out / "store", "--out", out, "--hostfile", out / "hostfile"]
    seconds["train"] = station("train", "train", *arguments, *args.overrides)
    summary = finish(out, seconds, args.slots)
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    print(f"\n{evaluate.table(summary['tasks'])}\n")
    times = ", ".join(f"{name} {value:.0f} s" for name, value in summary["seconds"].items())
    print(f"{summary['tokens_per_s']:,.0f} tokens/s, data wait {summary['data_wait_share']:.1%}; {times}")
    print(f"hub folder {summary['export']['folder']}, reloaded in a clean process: ", end="")
    print(f"largest difference {summary['export']['max_abs_difference']:.1e}")
    print(f"look at {out / 'predictions.png'}; everything else is in {out / 'summary.json'}")
    return 0


def station(*command: Any) -> float:
    """Run `python -m …`, shown as one would type it; returns its seconds."""
    words = [str(word) for word in command]
    print(f"\n$ python -m {shlex.join(words)}", flush=True)
    began_s = time.perf_counter()
    code = subprocess.run([sys.executable, "-m", *words]).returncode
    if code:
        raise DemoError(f"`python -m {shlex.join(words)}` ended with exit code {code}; its message is above.")
    return time.perf_counter() - began_s


def finish(out: Path, seconds: dict[str, float], world_size: int) -> dict[str, Any]:
    """Evaluate on the test split, export, reload in a clean process, draw; returns the summary."""
    print("\nevaluating on the test split …", flush=True)
    torch.set_num_threads(2)
    began_s = time.perf_counter()
    trained = load_trained(out)
    rows = evaluate.evaluate(trained, "test", evaluate.References(out / "truth"), num_windows=30)
    tasks = [row.summary() for row in rows]
    (out / "evaluation.json").write_text(json.dumps({"split": "test", "tasks": tasks}, indent=1))
    evaluate.save_predictions(out / "predictions.npz", rows)
    picture.draw(trained, "test", out / "predictions.png")
    seconds["evaluate"] = time.perf_counter() - began_s
    print("exporting, and predicting in a clean process …", flush=True)
    began_s = time.perf_counter()
    export.export(trained, out / "hub", {"split": "test", "tasks": tasks})
    difference = _check_export(trained, out / "hub")
    seconds["export"] = time.perf_counter() - began_s
    metrics = read_metrics(out)
    total_s = sum(row["seconds"] for row in metrics)
    return {
        "tasks": tasks,
        "world_size": world_size,
        "num_steps": len(metrics),
        "tokens_per_s": sum(row["tokens_per_s"] * row["seconds"] for row in metrics) / total_s,
        "data_wait_share": sum(row["data_wait_share"] * row["seconds"] for row in metrics) / total_s,
        "loss_first": float(np.mean([row["loss"] for row in metrics[:20]])),
        "loss_last": float(np.mean([row["loss"] for row in metrics[-20:]])),
        "seconds": seconds,
        "export": {"folder": str(out / "hub"), "max_abs_difference": difference},
    }


def _check_export(trained: Trained, hub: Path) -> float:
    """The first held-out window on which some task can be asked, predicted by a stranger."""
    context_ns = round(trained.run.data.context_s * 1e9)
    for task in TASKS:
        for session, entry in enumerate(trained.store.entries):
            starts = evaluate.spread(trained, "test", session, 1)
            if starts and evaluate.suits(task, entry):
                window = trained.reader.read(session, starts[0], context_ns)
                return export.check(trained, hub, window, task_mask(task, window.tokens, trained.run.data.context_s))
    raise DemoError(
        f"{trained.store.root} has no held-out window of {trained.run.data.context_s} s to check the export on."
    )


def _clear(out: Path) -> None:
    """Start afresh; a folder that no demo made is left alone."""
    if out.exists() and any(out.iterdir()):
        if not (out / MARKER).exists():
            raise DemoError(f"{out} exists and was not made by the demo. Give another folder: make demo OUT=…")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()
