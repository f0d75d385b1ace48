"""The training loop of one rank: `python -m train worker`, started by the launcher.

In: a run folder with its resolved configuration, and a store. Out: checkpoints and metrics in the run folder.
"""

import argparse
import hashlib
import json
import os
import platform
import signal
import sys
import warnings
from pathlib import Path
from types import FrameType

import deepspeed
import torch
import torch.distributed as dist

from prep.settings import ConfigError
from prep.store import Store
from train import chance, checkpoint, compiled, config, pretrained, start
from train.build import model_config
from train.config import RunConfig
from train.engine import Engine
from train.exit_codes import STOPPED
from train.heartbeat import FIRST_STEP, Heart
from train.incidents import Incidents
from train.loader import TrainingSamples, batches
from train.metrics import MetricsLog
from train.module_trace import module_traces
from train.profiling import Profiler
from train.saving import Saver
from train.self_check import Peers, surroundings, weights
from train.sources import SourceTable
from train.step import take_step
from train.validation import Validation

_stop_requested = False


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of one rank."""
    parser.add_argument("--out", type=Path, required=True, help="run folder, made by `python -m train train`")
    parser.add_argument("--resume", choices=["auto", "must", "never"], default="auto")


def main(args: argparse.Namespace) -> int:
    """Train one rank; the launcher has set RANK, WORLD_SIZE and the rendezvous."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _request_stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])  # one may have been waiting (train/ranks.py)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's, each step
    if not (args.out / "config.yaml").exists():
        raise ConfigError(
            f"{args.out} holds no config.yaml on this host. The run folder must lie on a disk that all hosts share: "
            f"every rank writes its part of a checkpoint there. `make doctor OUT={args.out}` names those that do not."
        )
    run, rank = config.load(args.out / "config.yaml"), int(os.environ["RANK"])
    heart = Heart(args.out / "logs", rank, FIRST_STEP * run.faults.watchdog_s)
    try:
        peers = Peers(rank, int(os.environ["WORLD_SIZE"]), heart.patience_s / 2)  # who waits is not late yet
        return train(args.out, run, args.resume, peers, heart)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        heart.stop()


def _request_stop(number: int, frame: FrameType | None) -> None:
    global _stop_requested
    _stop_requested = True


def stop_requested() -> bool:
    """Has a signal asked this rank to save and leave?"""
    return _stop_requested


def train(run_dir: Path, run: RunConfig, resume: str, peers: Peers, heart: Heart) -> int:
    """Run the steps that are left. Returns 0, or STOPPED after a signal."""
    store = Store(json.loads((run_dir / "run.json").read_text())["store"])
    rank, world_size = peers.rank, peers.world_size
    samples = TrainingSamples(store.address, run, model_config(run))
    heart.enter("self_check")
    peers.agree(surroundings(run, store.digest(), world_size) | module_traces(samples, rank, world_size))
    heart.enter("engine")
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    chance.seed_everything(run.seed)
    sources = SourceTable(store)
    engine = Engine(run, sources.keys, world_size)
    first_step = _resume(engine, run_dir, resume, samples, sources)
    heart.enter("self_check")
    peers.agree({"start": [f"step {first_step}"], "weights": weights(engine.model, deepspeed.zero.GatheredParameters)})
    engine.timer.on_phase = heart.enter
    if rank == 0:
        _write_environment(engine, run_dir, world_size, store)
    engine.timer.time_collectives()
    log = MetricsLog(run_dir, run, first_step) if rank == 0 else None
    incidents, validation = Incidents(run_dir, samples), Validation(store, run)
    profiler = Profiler(samples, run_dir, rank, world_size)
    saver = Saver(run_dir / "checkpoints", run)
    state = {
        "store_digest": store.digest(),
        "config_digest": _digest(run_dir / "config.yaml"),
        "eras": samples.order.state,
    }
    feed = batches(samples, first_step, rank, world_size)
    per_step = config.gradient_accumulation(run.train, world_size)
    done = set[config.Turn]()
    try:
        for step in range(first_step, run.train.num_steps):
            heart.patience_s = patience_s(run, step, done)
            heart.begin(step)
            with profiler.watch(step):
                row, windows, stop = take_step(engine, feed, per_step, step, stop_requested)
            incidents.note_skipped(step, feed.skipped)
            if log is not None:
                log.write(row)
            spike = incidents.judge(step, engine.moved, row["loss"], windows)
            if spike is not None:
                heart.enter("rewind")
                incidents.rewound(step, spike, _rewind(engine, saver, spike))
            if run.train.compile and step + 1 - first_step == len(run.turns):  # each shape has had its turn
                _say(compiled.summary())
            last = step + 1 == run.train.num_steps
            if validation.is_due(step + 1):
                heart.enter("validation")
                scores = validation.score(engine.predict, engine.device)
                if log is not None:
                    log.write_validation({"step": step + 1, **scores})
            saver.check()
            if (step + 1) % run.checkpoint_every == 0 or last or stop or spike is not None:
                heart.enter("save")
                position = (step + 1) * run.train.global_batch_size
                saver.save(engine, step + 1, {**state, "position": position})
            if stop or last:
                saver.wait()
            done.add(run.turn(step))
            if stop and not last:
                _say(f"asked to stop: saved step {step + 1}; the same command goes on from there")
                return STOPPED
    finally:
        feed.close()
        if log is not None:
            log.close()
    return 0


def patience_s(run: config.RunConfig, step: int, done: set[config.Turn]) -> float:
    """How long a phase of a step may last: longer in the first one, and where a graph is compiled for a new turn."""
    is_new = not done or (run.train.compile and run.turn(step) not in done)
    return run.faults.watchdog_s * (FIRST_STEP if is_new else 1)


def _rewind(engine: Engine, saver: Saver, begun: int) -> int | None:
    """Undo a spike: everything that is trained goes back to the checkpoint before it, the data and the step go on.

    So the position stays `step * global_batch_size`, and what the spike has read is not read again. What stands then is
    saved at once: a resumed run begins there. Returns the checkpoint's step, or None where there is none so old.
    """
    saver.wait()
    found, _ = checkpoint.newest_of_all_ranks(saver.root, begun)
    if found is None:
        return None
    checkpoint.restore(engine, found)
    return found.step


def _resume(engine: Engine, run_dir: Path, resume: str, samples: TrainingSamples, sources: SourceTable) -> int:
    root = run_dir / "checkpoints"
    found, passed_over = checkpoint.newest_of_all_ranks(root) if resume != "never" else (None, [])
    for reason in passed_over:
        _say(f"passed over: {reason}")
    if found is None:
        if resume == "must":
            raise checkpoint.CheckpointError(
                f"{root} has no sealed checkpoint, and --resume must was given. Check OUT, or leave --resume out."
            )
        hub = start.begun_with(run_dir, "hub")
        if hub is not None:
            rows = pretrained.begin(engine, hub, sources)
            _say(f"starting with the weights of {hub} ({rows} of {len(sources)} unit rows)")
            return 0
        origin = start.begun_with(run_dir, "origin")
        if origin is None:
            _say("starting from step 0")
            return 0
        found = checkpoint.open_checkpoint(origin, slice(dist.get_rank(), None, dist.get_world_size()))
    rows = checkpoint.restore(engine, found)
    _say(f"resuming from {found.path} (step {found.step}, {rows} unit rows)")
    samples.go_on(found.state())
    return found.step


def _write_environment(engine: Engine, run_dir: Path, world_size: int, store: Store) -> None:
    (run_dir / "ds_config.json").write_text(json.dumps(engine.ds_config, indent=1))
    units = len(engine.table) * engine.table.weight.shape[1]
    environment = {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "world_size": world_size,
        "device": str(engine.device),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "store_digest": store.digest(),
        "num_parameters_core": engine.num_parameters,
        "num_parameters_units": units,
    }
    (run_dir / "environment.json").write_text(json.dumps(environment, indent=1))
    _say(f"{engine.num_parameters:,} core parameters, {units:,} in the unit table, {world_size} ranks")


def _say(message: str) -> None:
    if dist.get_rank() == 0:
        print(message, flush=True)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
