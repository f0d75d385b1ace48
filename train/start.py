"""`python -m train train`: prepare the run folder, then start the ranks of the hostfile.

In: a run's YAML, a store, a hostfile; for a branch, a checkpoint of another run; for fine-tuning, a hub folder. Out:
runs/<name>/ with the resolved configuration, and the launcher's exit code.
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

from prep.settings import ConfigError
from prep.store import Store
from train import config, hostfile, launch
from train.healing import Healing, Terms
from train.mixing import session_weights
from train.supervise import Signals


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--config", type=Path, required=True, help="the run's YAML, for instance train/configs/debug.yaml"
    )
    parser.add_argument("--store", required=True, help="token store, made by `make prep`: a folder, s3://…, https://…")
    parser.add_argument("--out", type=Path, required=True, help="run folder; a run that is there goes on")
    parser.add_argument("--hostfile", type=Path, required=True, help="made by `make hostfile`")
    parser.add_argument("--resume", choices=["auto", "must", "never"], default="auto")
    begins = parser.add_mutually_exclusive_group()
    begins.add_argument(
        "--hub",
        type=Path,
        metavar="FOLDER",
        help="a new run that begins with the weights of a hub folder, and with its rows of sources that it knows",
    )
    begins.add_argument(
        "--from",
        type=Path,
        dest="origin",
        metavar="RUN_DIR[/checkpoints/step-N]",
        help="a new run that goes on from another's checkpoint and decays over train.decay_steps (train.schedule=wsd)",
    )
    parser.add_argument(
        "--nodes", type=int, help="use the first NODES hosts of the hostfile that answer; the others are spares (all)"
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=3,
        help="over several hosts: restarts by itself, without a new checkpoint in between (%(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run where, and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance train.num_steps=100")


def main(args: argparse.Namespace) -> int:
    """Check everything that can be checked before a rank is started, then launch."""
    hosts = hostfile.read(args.hostfile) if args.dry_run else hostfile.read_for_run(args.hostfile, os.environ)
    run = config.load(args.config, args.overrides)
    used = hosts if args.nodes is None else hosts[: args.nodes]
    if len(used) != (args.nodes or len(hosts)):
        raise ConfigError(
            f"--nodes {args.nodes}, but {args.hostfile} has {len(hosts)} host(s). Give 1 to {len(hosts)}."
        )
    config.deepspeed_config(run, sum(host.slots for host in used))
    store = Store(args.store)
    if not store.entries:
        raise ConfigError(f"{args.store} holds no session. Ingest recordings first: make prep SRC=… OUT={args.store}")
    session_weights(store.entries, run.data.weights)
    resume = "must" if args.resume == "must" else "auto"  # never: `prepare` refuses checkpoints, but a restart has some
    command = [sys.executable, "-m", "train", "worker", "--out", str(args.out.resolve()), "--resume", resume]
    run, origin = branch(run, args.origin, args.out) if args.origin else (run, None)
    check_hub(args.hub, run, args.out)
    if args.dry_run:
        print(launch.plan(used, command, args.out / "logs", os.environ))
        print("".join(f"spare: {host.name}\n" for host in hosts[len(used) :]), end="")
        return 0
    prepare(run, store, args.out, args.resume, origin, args.hub)
    if len(hosts) == 1:
        return launch.launch(hosts, command, args.out / "logs", os.environ)
    terms = Terms(num_nodes=len(used), max_restarts=args.max_restarts, fits=lambda ranks: fits(run, ranks))
    with Signals() as signals:
        launcher = launch.Launcher(command, args.out / "logs", os.environ, signals)
        return Healing(hosts, terms, args.out, launcher, signals).run()


def fits(run: config.RunConfig, num_ranks: int) -> bool:
    """May a run have this number of ranks, with its global batch as it is?"""
    try:
        config.deepspeed_config(run, num_ranks)
    except ConfigError:  # the batch does not divide among them
        return False
    return True


def check_hub(hub: Path | None, run: config.RunConfig, out: Path) -> None:
    """Refuse a hub folder that a new run cannot begin with; a run that has saved goes on without it."""
    if hub is not None and not has_checkpoints(out):
        from train import pretrained  # seconds: only where a run begins with a hub folder

        pretrained.check(hub, run)


def branch(run: config.RunConfig, start: Path, out: Path) -> tuple[config.RunConfig, Path]:
    """A run that begins at another's checkpoint and only decays, and that checkpoint.

    Raises:
        ConfigError: the schedule does not decay, or the other run's data or model are not this one's.
        CheckpointError: there is no sealed checkpoint.
    """
    if run.train.schedule != "wsd" or not run.train.decay_steps:
        raise ConfigError(
            f"--from {start} decays from a checkpoint, but train.schedule is {run.train.schedule} and "
            f"train.decay_steps is {run.train.decay_steps}. Give train.schedule=wsd train.decay_steps=N."
        )
    from train import checkpoint  # seconds: only for a branch

    origin = begun_with(out, "origin")  # if it has begun: the other run may be further by now
    if origin is None:
        is_one = (start / "manifest.json").exists()
        origin = (checkpoint.open_checkpoint(start) if is_one else checkpoint.newest_of_run(start)).path.resolve()
        _check_goes_on(config.load(origin.parent.parent / "config.yaml"), run, origin)
    num_steps = checkpoint.step_of(origin) + run.train.decay_steps
    return replace(run, train=replace(run.train, num_steps=num_steps)), origin


def has_checkpoints(out: Path) -> bool:
    """Has the run of a folder saved anything?"""
    return any((out / "checkpoints").glob("step-*"))


def begun_with(out: Path, kind: Literal["origin", "hub"]) -> Path | None:
    """What a run began with, if it did: the checkpoint of another run ("origin"), or a hub folder ("hub")."""
    path = out / "run.json"
    found = json.loads(path.read_text()).get(kind) if path.exists() else None
    return None if found is None else Path(found)


def prepare(
    run: config.RunConfig,
    store: Store,
    out: Path,
    resume: str = "auto",
    origin: Path | None = None,
    hub: Path | None = None,
) -> None:
    """Write the resolved configuration; a run that is there may go on longer, but not become another model."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "config.yaml"
    if has_checkpoints(out) and resume == "never":
        raise ConfigError(
            f"{out} holds checkpoints, and --resume never would mix two runs in one folder. "
            "Give another OUT, or remove that one."
        )
    first_hub = begun_with(out, "hub")
    if path.exists() and has_checkpoints(out):
        _check_goes_on(config.load(path), run, out)
        if hub is not None and hub.resolve() != first_hub:
            raise ConfigError(
                f"{out} holds a run that began with {first_hub or 'weights of its own'}, not with {hub.resolve()}. "
                "Give another OUT, or leave --hub out: the run goes on from its checkpoint."
            )
    run.save(path)
    begins = {"origin": origin or begun_with(out, "origin"), "hub": hub.resolve() if hub else first_hub}
    content = {"store": store.address, **{kind: place and str(place) for kind, place in begins.items()}}
    (out / "run.json").write_text(json.dumps(content, indent=1))


def _check_goes_on(before: config.RunConfig, run: config.RunConfig, where: Path) -> None:
    if (before.model, before.data.context_s) != (run.model, run.data.context_s):
        raise ConfigError(
            f"{where} holds a run of another model ({before.model}). Give another OUT, or the same model."
        )
    if before.train.optimizer != run.train.optimizer:
        raise ConfigError(
            f"{where} has trained by {before.train.optimizer}, whose moments are not those of {run.train.optimizer}. "
            f"Set train.optimizer={before.train.optimizer}, or give another OUT."
        )
    if order(before) != order(run):
        raise ConfigError(
            f"{where} has trained on data in another order: seed, data (but num_workers and bad_windows, and weights if"
            " no family has its own), and of train global_batch_size, families and context_schedule must stay as they "
            "were. Give another OUT, or leave them as in its config.yaml."
        )


def order(run: config.RunConfig) -> tuple[object, ...]:
    """All that decides which window, unit and mask stands at which position of a run.

    But for weights of sessions: new ones may bring some, and those of others are kept (train/eras.py). Where a family
    has weights of its own, of which eras keep nothing, all stay as they were.
    """
    weights = run.data.weights if run.data.weights.families else config.Weights()
    data = replace(run.data, num_workers=0, bad_windows="stop", weights=weights)
    return run.seed, data, run.train.global_batch_size, run.train.families, run.train.context_schedule
