"""A published model for your own recordings: units that it has never seen get an identity; its weights stay.

In: a hub folder, a token store. Out: <out>/hub, the same weights with rows for every source of the store, and
<out>/adapt.json. What is known of a unit decides: its row is there and stays; it is inferred from a support segment,
the train split (nothing is trained; train/support.py); it is then fitted by `--steps` (few-shot, rows alone).
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from prep.settings import ConfigError
from prep.store import Store
from train import export
from train.config import OptimConfig
from train.loader import TrainingSamples, batches
from train.schedule import lr_factor
from train.support import infer_rows
from train.trained import ADAPTED, Known, Trained, open_hub

SHOWN_EVERY = 20
FIT_UNITS = 256  # of a window: each is read from as many others as when it will be asked for
FIT_QUERIES = 8192
FIT = OptimConfig(  # what a user asks of a model: activity from all that is known, behaviour, units from each other
    unit_lr=0.03,
    warmup_steps=10,
    unit_dropout=0.0,
    families=("leave_out+decoding", "encoding", "leave_out+decoding"),
)


class AdaptError(ConfigError):
    """A model cannot be adapted; the message says why and what to do."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m train adapt`."""
    parser.add_argument("--hub", type=Path, required=True, help="folder of the model (make export)")
    parser.add_argument("--store", required=True, help="token store of the new recordings (make prep)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write: hub/ and adapt.json")
    parser.add_argument("--steps", type=int, default=0, help="fit rows for so many steps (default: infer them only)")
    parser.add_argument("--lr", type=float, default=FIT.unit_lr, help="learning rate of the rows")
    parser.add_argument("--dry-run", action="store_true", help="say which sources are known, and stop")


def main(args: argparse.Namespace) -> int:
    """Match, infer, fit, export."""
    if args.out.exists() and {path.name for path in args.out.iterdir()} - {"hub", ADAPTED}:
        raise AdaptError(f"{args.out} is neither empty nor an adapted model. Give another --out.")
    trained, known = open_hub(args.hub, Store(args.store))
    unknown, matched = known.unknown, known.matched
    table = trained.table
    say(f"{len(table.keys)} sources: {len(table.keys) - int(unknown.sum())} known, {int(unknown.sum())} new")
    for line in matched:
        say(line)
    if args.dry_run:
        return 0
    began_s = time.perf_counter()
    windows = [infer_all(trained, session, known) for session in range(len(trained.store.entries))]
    inferred_s, inferred = time.perf_counter() - began_s, int((table.weight.any(1).numpy() & unknown).sum())
    if args.steps:
        fit_rows(trained, unknown, replace(FIT, num_steps=args.steps, unit_lr=args.lr))
    args.out.mkdir(parents=True, exist_ok=True)
    report = {
        "model": str(args.hub.resolve()),
        "store": trained.store.address,
        "known": len(table.keys) - int(unknown.sum()),
        "inferred": inferred,
        "support_windows": windows,
        "seconds_inferring": round(inferred_s, 1),
        "fit_steps": args.steps,
        "channels_by_name": matched,
    }
    (args.out / ADAPTED).unlink(missing_ok=True)
    export.export(trained, args.out / "hub", None)
    (args.out / ADAPTED).write_text(json.dumps(report, indent=1))  # last: a folder that has it is whole
    say(f"{args.out / 'hub'} has them all; score it with: make eval RUN_DIR={args.out}")
    return 0


def infer_all(trained: Trained, session: int, known: Known) -> int:
    """Infer one session; says when there is nothing to infer from."""
    entry = trained.store.entries[session]
    name = f"{entry['dataset_id']}/{entry['session_id']}"
    has = {stream["modality"] for stream in entry["streams"]}
    if not has & {"behavior", "stimulus"}:
        say(f"{name}: no stimulus, no behaviour: new units have measured features only")
        return 0
    return infer_rows(trained, session, known, lambda text: say(f"{name}: {text}"))


def fit_rows(trained: Trained, unknown: npt.NDArray[np.bool_], optim: OptimConfig) -> None:
    """Few-shot: the new rows by the model's own loss on the train split; weights and known rows stay."""
    run = replace(
        trained.run, train=optim, data=replace(trained.run.data, max_units=FIT_UNITS, max_queries=FIT_QUERIES)
    )
    origins = trained.reader.source_table.origin_keys
    samples = TrainingSamples(trained.store.address, run, trained.model.config, origins)
    table, known = trained.table, torch.from_numpy(~unknown)
    kept = table.weight[known].clone()
    feed = batches(samples, 0, 0, 1)
    num_parts = optim.global_batch_size // optim.micro_batch_size
    for step in range(optim.num_steps):
        total = 0.0
        for _ in range(num_parts):
            batch = next(feed)
            embeds = table.lookup(batch.pop("unit_rows"))
            output = trained.model(unit_embeds=embeds, context_s=run.turn(step).context_s, **batch)
            (output.loss / num_parts).backward()
            total += float(output.loss.detach()) / num_parts
        table.step(optim.unit_lr * lr_factor(step, optim))
        table.weight[known] = kept
        if (step + 1) % SHOWN_EVERY == 0:
            say(f"fit {step + 1}/{optim.num_steps}: {run.turn(step).mix} loss {total:+.4f}")
    feed.close()


def say(text: str) -> None:
    """Progress, at once."""
    print(text, flush=True)
