"""`python -m train sbatch`: the batch script of a run, made of hostfiles/slurm-8x8-h100.sbatch, and how to submit it.

In: a run's YAML, a store, a run folder, a hub folder to begin with or none, how many nodes with how many ranks for how
long. Out: `job.sbatch` and `job.yaml`, the run as it is now, in the run folder; the command. Submitted is only what is
asked to be.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from prep.settings import ConfigError
from train import config, start

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "hostfiles" / "slurm-8x8-h100.sbatch"
MADE = "# Made of hostfiles/slurm-8x8-h100.sbatch, which says more, by `make sbatch`: make it anew, do not change it."
TO_CHANGE = re.compile(r"\s+# CHANGE.*")
TIME = re.compile(r"([0-9]+-)?[0-9]+(:[0-9]+){0,2}", re.ASCII)  # minutes, h:m:s, days-hours, …


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--config", type=Path, required=True, help="the run's YAML, for instance train/configs/1b.yaml")
    parser.add_argument("--store", required=True, help="token store, at a place that every node sees")
    parser.add_argument("--out", type=Path, required=True, help="run folder, likewise; a run that is there goes on")
    parser.add_argument(
        "--hub", type=Path, metavar="FOLDER", help="of a new run: begin with the weights of a hub folder"
    )
    parser.add_argument("--nodes", type=int, default=8, help="how many nodes (default: %(default)s)")
    parser.add_argument("--slots", type=int, default=8, help="GPUs, or ranks, of each (default: %(default)s)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="default: %(default)s")
    parser.add_argument("--time", default="24:00:00", help="of one allocation (default: %(default)s)")
    parser.add_argument("--submit", action="store_true", help="submit it as well")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance train.num_steps=100")


def main(args: argparse.Namespace) -> int:
    """Check what can be checked before the job waits in a queue; write, and say how to submit."""
    run = config.load(args.config, args.overrides)
    if min(args.nodes, args.slots) < 1:
        raise ConfigError(f"--nodes {args.nodes} --slots {args.slots}: both must be at least 1.")
    if not TIME.fullmatch(args.time):
        raise ConfigError(
            f"--time {args.time!r} is no time of SLURM's. Expected 90 (minutes), 24:00:00 or 2-12 (days)."
        )
    config.deepspeed_config(run, args.nodes * args.slots)
    out = args.out.resolve()
    start.check_hub(args.hub, run, out)
    out.mkdir(parents=True, exist_ok=True)
    script, frozen = out / "job.sbatch", out / "job.yaml"
    run.save(frozen)
    options = {
        "job-name": out.name,
        "nodes": str(args.nodes),
        "ntasks-per-node": "1" if args.device == "cuda" else str(args.slots),
        "gpus-per-node": str(args.slots) if args.device == "cuda" else None,
        "time": args.time,
        "output": f"{out}/slurm-%j.log".replace("%", "%%").replace("%%j", "%j"),
    }
    store = args.store if "://" in args.store else str(Path(args.store).resolve())
    values = {"STORE": store, "RUN": str(frozen), "OUT": str(out), "python": sys.executable}
    values["hub"] = str(args.hub.resolve()) if args.hub else ""
    script.write_text(fill(TEMPLATE.read_text(), options, {**os.environ, **values}))
    command = ["sbatch", f"--chdir={ROOT}", str(script)]
    print(shlex.join(command), flush=True)
    return subprocess.run(command, check=False).returncode if args.submit else 0


def fill(template: str, options: Mapping[str, str | None], values: Mapping[str, str]) -> str:
    """A batch script with options of sbatch (None: left out), and with values for the variables marked CHANGE.

    A variable without a value is left out, and a line without a variable; every value is quoted.
    """
    first, *lines = template.splitlines()
    filled = [first, MADE]
    for line in lines[next(number for number, line in enumerate(lines) if line.startswith("#SBATCH")) :]:
        option = re.match(r"#SBATCH --([a-z-]+)", line)
        if option and option[1] in options:
            value = options[option[1]]
            filled += [] if value is None else [f"#SBATCH --{option[1]}={_quoted(value)}"]
        elif TO_CHANGE.search(line):
            names = re.findall(r"\b(\w+)=(?=\S)", TO_CHANGE.sub("", line))
            given = " ".join(f"{name}={shlex.quote(values[name])}" for name in names if name in values)
            filled += [f"{'export ' * line.startswith('export ')}{given}"] if given else []
        else:
            filled.append(line)
    return "\n".join(filled) + "\n"


def _quoted(value: str) -> str:
    """As sbatch reads it behind #SBATCH: a word as it is, else between double quotes."""
    if re.fullmatch(r"[\w@+=:,./%-]+", value, re.ASCII):
        return value
    escaped = re.sub(r'(["\\])', r"\\\1", value)
    return f'"{escaped}"'
