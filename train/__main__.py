"""The command line of train: `python -m train train | watch | report | eval | audit | export | …`.

In: arguments. Out: exit code 0 done, 1 something failed (named), 2 usage or configuration.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {  # command: (module, what it does)
    "train": ("train.start", "train a model on a store, on the hosts of a hostfile; resumes by itself"),
    "eval": ("train.evaluate", "held-out deviance explained, per modality and task"),
    "audit": ("train.audit", "show that nothing a task hides reaches the model"),
    "watch": ("train.watch", "a run as it goes on, in a terminal"),
    "report": ("train.report", "curves, scores and pictures of a run, as one HTML file"),
    "export": ("train.export", "turn the newest checkpoint into a hub folder"),
    "adapt": ("train.adapt", "give a hub folder identities for the units of another store; nothing of it is trained"),
    "push": ("train.push", "upload a hub folder to a model hub"),
    "hostfile": ("train.allocation", "write a hostfile from a scheduler, a list of nodes or this machine"),
    "stage": ("train.stage", "put the code, and a run's YAML, on hosts that share no disk"),
    "doctor": ("train.doctor", "is every host fit to train? a line per check and host, with what mends it"),
    "dry-run": (
        "train.dry_run",
        "what a run needs of a machine, and how many days it takes, found without one",
    ),
    "sbatch": ("train.batch_job", "the batch script of a run for SLURM, and how to submit it"),
    "launch": ("train.launch", "start a command once per slot of a hostfile"),
    "demo": ("train.demo", "the whole road on this machine, from a synthetic brain to a hub folder"),
    "worker": ("train.loop", "one rank of a training run (the launcher starts it)"),
    "agent": ("train.agent", "the ranks of one host (the launcher starts it there)"),
    "doctor-probe": ("train.doctor_probe", "what one host has (the doctor starts it there)"),
    "doctor-pairs": ("train.doctor_pairs", "all-reduces between hosts (the doctor starts it on each)"),
}
USAGE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a person's mistake is one message on stderr, never a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m train", description="A token store in, a hub folder out.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name in arguments[:1]:  # only the command that runs is imported
            importlib.import_module(COMMANDS[name][0]).configure(command)
    args = parser.parse_args(arguments)
    try:
        return int(importlib.import_module(COMMANDS[args.command][0]).main(args))
    except ValueError as error:
        if not is_users_mistake(error):
            raise
        print(f"train {args.command}: {error}", file=sys.stderr)
        return USAGE


def is_users_mistake(error: ValueError) -> bool:
    """The project's own errors are messages to a person; any other ValueError is a bug, shown whole."""
    return type(error).__module__.split(".")[0] in ("prep", "train")


if __name__ == "__main__":
    sys.exit(main())
