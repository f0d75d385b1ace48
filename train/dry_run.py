"""`python -m train dry-run`: what a run would need and how long it would take, on any number of GPUs, without one.

In: a run's YAML, a number of nodes and GPUs or a hostfile, a store if there is one. Out: the plan, as tables or as
JSON; exit code 2 where it does not fit, with what would.
"""

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from prep.settings import ConfigError, build
from prep.store import Store
from train import config, hostfile
from train.config import RunConfig
from train.memory import Job, Zero
from train.plan import GIB, Plan, plan_of, samples_of
from train.plan_table import scale_of, show
from train.sources import SourceTable
from train.traffic import FP32_TFLOPS, Machine, laptop

SCALES = (1, 2, 4, 8)  # nodes that are always compared
MOST_NODES = 64  # that are tried where fewer cannot hold a run
ROWS = 1_000_000  # of the unit table, where there is no store
OF_THE_MACHINE = {  # what is measured most often; all other fields of Machine are taken from --measured
    "memory_gib": "memory of a GPU",
    "peak_tflops": "what a GPU can do, without sparsity",
    "mfu": "share of it that is assumed",
    "bandwidth_intra": "GB/s of a GPU to the others of its node",
    "bandwidth_inter": "GB/s of a GPU's network card; `make doctor` measures it",
    "latency_inter": "microseconds of a message to another node; `make doctor` measures it",
}


class DoesNotFit(ValueError):
    """A run needs more memory than there is; the message names the parts, and what would fit."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--config", type=Path, required=True, help="the run's YAML, for instance train/configs/1b.yaml")
    parser.add_argument("--store", help="token store: the shapes of its windows, and days for one pass through it")
    parser.add_argument("--hostfile", type=Path, help="made by `make hostfile`; or:")
    parser.add_argument("--nodes", type=int, default=1, help="how many nodes (default: %(default)s)")
    parser.add_argument("--slots", type=int, default=1, help="GPUs, or ranks, of each (default: %(default)s)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="default: %(default)s, an H100")
    parser.add_argument("--units", type=int, help=f"rows of the unit table (default: the store's, or {ROWS:,})")
    parser.add_argument("--measured", type=Path, help="JSON with what was measured of the machine, by the same names")
    for name, text in OF_THE_MACHINE.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, help=text)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance train.micro_batch_size=8")


def main(args: argparse.Namespace) -> int:
    """Plan, print, and refuse what does not fit."""
    run = config.load(args.config, args.overrides)
    nodes, slots = _size(args)
    store = Store(args.store) if args.store else None
    num_rows = args.units or (ROWS if store is None else len(SourceTable(store)))
    job = job_of(run, nodes, slots, num_rows, args.device == "cuda")
    plan = plan_of(job, machine_of(args, run), *samples_of(run, store))
    others = scaled(plan)
    if args.json:
        print(json.dumps({**plan.as_dict(), "scaling": [scale_of(other) for other in others]}, indent=1))
    else:
        show(plan, others)
    if plan.shortage:
        ways = "; ".join(ways_out(plan)) or "nothing that was tried: take a smaller preset"
        raise DoesNotFit(f"{args.config} does not fit on {nodes} x {slots}: {plan.shortage}. What would fit: {ways}.")
    return 0


def scaled(plan: Plan) -> list[Plan]:
    """The same run on other numbers of nodes, where its batch can be shared among their ranks."""
    job, train = plan.job, plan.job.run.train
    numbers = sorted({*SCALES, job.nodes})
    shared = [n for n in numbers if train.global_batch_size % (train.micro_batch_size * n * job.slots) == 0]
    return [replace(plan, job=replace(job, nodes=number)) for number in shared]


def _size(args: argparse.Namespace) -> tuple[int, int]:
    """Nodes, and ranks of each."""
    if args.hostfile:
        hosts = hostfile.read(args.hostfile)
        return len(hosts), hosts[0].slots
    if min(args.nodes, args.slots) < 1:
        raise ConfigError(f"--nodes {args.nodes} --slots {args.slots}: both must be at least 1.")
    return args.nodes, args.slots


def job_of(run: RunConfig, nodes: int, slots: int, num_rows: int, on_cuda: bool) -> Job:
    """A run on so many ranks; raises ConfigError where its batch cannot be shared among them."""
    zero = Zero.of(config.deepspeed_config(run, nodes * slots))
    return Job(run=run, zero=zero, nodes=nodes, slots=slots, num_rows=num_rows, on_cuda=on_cuda)


def machine_of(args: argparse.Namespace, run: RunConfig) -> Machine:
    """Assumed, then measured, then what the run and the command line say."""
    machine = Machine()
    if args.device == "cpu":
        machine = laptop(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB)
    elif run.train.precision == "fp32":
        machine = replace(machine, peak_tflops=FP32_TFLOPS)
    known = asdict(machine)
    if args.measured:
        known |= asdict(build(Machine, {**known, **_read(args.measured)}, str(args.measured)))
    if run.peak_tflops:
        known["peak_tflops"] = run.peak_tflops
    known |= {name: getattr(args, name) for name in OF_THE_MACHINE if getattr(args, name) is not None}
    return Machine(**known)


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f'--measured {path} cannot be read ({error}). Expected JSON: {{"mfu": 0.4, …}}.') from error
    return content


def ways_out(plan: Plan) -> Iterator[str]:
    """Changes to a run that does not fit, each alone, with which it would; of each kind the least."""
    run, job = plan.job.run, plan.job
    for path in sorted(Path(run.ds_config).parent.glob("*.json")):
        if _suits(path, job) and not replace(plan, job=_with(job, replace(run, ds_config=str(path)))).shortage:
            yield f"ds_config={path}"
    size = run.train.micro_batch_size
    halves = [size >> times for times in range(1, size.bit_length()) if size % (1 << times) == 0]
    if _fits(plan, activation_checkpointing=True):
        yield "train.activation_checkpointing=true"
    half = next((half for half in halves if _fits(plan, micro_batch_size=half)), None)
    if half:
        yield f"train.micro_batch_size={half}"
    nodes = [job.nodes << times for times in range(1, MOST_NODES.bit_length())]
    shared = [n for n in nodes if run.train.global_batch_size % (size * n * job.slots) == 0]
    if number := next((n for n in shared if not replace(plan, job=replace(job, nodes=n)).shortage), None):
        yield f"{number} nodes"


def _fits(plan: Plan, **of_train: Any) -> bool:
    run = replace(plan.job.run, train=replace(plan.job.run.train, **of_train))
    return not plan_of(_with(plan.job, run), plan.machine, plan.samples, plan.recordings).shortage


def _suits(mechanics: Path, job: Job) -> bool:
    """Can these mechanics run on so many ranks? The second partition of hpZ is cut into the ranks of a node."""
    return job.slots % Zero.of(json.loads(mechanics.read_text())).zero_hpz_partition_size == 0


def _with(job: Job, run: RunConfig) -> Job:
    return job_of(run, job.nodes, job.slots, job.num_rows, job.on_cuda)
