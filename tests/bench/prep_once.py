"""Runs prep on recordings in this process, without Dask: plan, every shard, finish, catalog.

In: a recording or a folder of them, an empty folder for the store; `--profile`. Out: the store; its cost by phase on
stdout.
"""

import argparse
import cProfile
import pstats
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import store_builders
from measure import Parts, measured

import prep.catalog
import prep.nwb.join  # what the planner imports when it is called
import prep.recipe
from prep.frames import writing_what_is_seen
from prep.plan import SessionPlan
from prep.tasks import plan_from_nwb

NUM_FUNCTIONS = 45
RUN = "test"  # as store_builders call the run that writes


def ingest(recordings: Sequence[Path], root: Path, parts: Parts) -> None:
    """What `python -m prep ingest` does for these files, one after the other."""
    recipe = prep.recipe.load(None)
    root.mkdir(parents=True, exist_ok=True)
    for name, function in list(vars(store_builders).items()):
        if name.startswith(("write_", "finish_")) and function.__module__ == "prep.write_session":
            setattr(store_builders, name, _counted(parts, function))
    for recording in recordings:
        with parts("plan: inventory, clocks, audit"):
            with writing_what_is_seen(root, RUN):
                plan = plan_from_nwb([recording], recipe, "bench")
        with parts("digest of the recording"):
            target = store_builders.target(root, plan, recipe.digest())
        store_builders.write_plan(plan, target)
    with parts("catalog"):
        prep.catalog.write(root)


def _counted(parts: Parts, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of prep that writes, counted from outside under its name and its stream's."""

    def counted(*args: Any, **more: Any) -> Any:
        plans = [arg for arg in args if isinstance(arg, SessionPlan)]
        numbers = [arg for arg in args if isinstance(arg, int)]
        of = f" of {plans[0].streams[numbers[0]].spec.name}" if plans and numbers else ""
        with parts(f"{function.__name__}{of}"):
            return function(*args, **more)

    return counted


def main() -> None:
    """Run, and say what it cost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recording", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("--profile", action="store_true", help="print the functions that take most")
    args = parser.parse_args()
    profile = cProfile.Profile()
    with measured() as parts:
        if args.profile:
            profile.enable()
        found = sorted(args.recording.glob("*.nwb")) if args.recording.is_dir() else [args.recording]
        ingest(found, args.store, parts)
        profile.disable()
    if args.profile:
        stats = pstats.Stats(profile).strip_dirs()
        stats.sort_stats("cumulative").print_stats(NUM_FUNCTIONS)
        stats.sort_stats("tottime").print_stats(NUM_FUNCTIONS)


if __name__ == "__main__":
    main()
