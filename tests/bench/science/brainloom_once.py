"""Brainloom on one recording and split: trained, exported, scored.

In: a recording, a fold, a folder. Out: a table on stdout, {task}.npz in the folder.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.science import protocol
from bench.science.brainloom import TASKS, Hub, predict, train
from bench.science.recordings import NUM_FOLDS, read


def main() -> None:
    """Train and score one split; a hub folder that is there is not trained again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recording", type=Path)
    parser.add_argument("--fold", choices=["main", *map(str, range(NUM_FOLDS))], default="main")
    parser.add_argument("--split", choices=["valid", "test"], default="valid")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="key=value", help="of the run, for instance train.seed=1"
    )
    args = parser.parse_args()
    recording, fold = read(args.recording), None if args.fold == "main" else int(args.fold)
    began = time.perf_counter()
    hub = args.out / "hub"
    if not (hub / "config.json").exists():
        train(args.recording, recording, fold, args.out, tuple(args.set))
    print(f"trained in {time.perf_counter() - began:.0f} s", flush=True)
    loaded = Hub.load(hub)
    for task in TASKS[recording.name]:
        found = predict(loaded, recording, task, protocol.queries(recording, task, args.split, fold))
        figures = protocol.score(recording, task, found, args.split, fold)
        protocol.save(args.out / args.split, task, found)
        print(task, {name: round(value, 4) for name, value in figures.items()}, flush=True)


if __name__ == "__main__":
    main()
