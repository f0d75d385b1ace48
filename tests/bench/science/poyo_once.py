"""The table of POYO on one recording.

In: a recording, steps of training, folds, a folder for the predictions. Out: a table on stdout, {task}.npz.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.science import peer, protocol
from bench.science.recordings import NUM_FOLDS, read


def main() -> None:
    """Train and score on the splits that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recording", type=Path)
    parser.add_argument("--folds", nargs="+", choices=["main", *map(str, range(NUM_FOLDS))], default=["main"])
    parser.add_argument("--steps", type=int, default=peer.NUM_STEPS)
    parser.add_argument("--out", type=Path, help="predictions go to OUT/recording/split/POYO/{task}.npz")
    args = parser.parse_args()
    recording = read(args.recording)
    for label in args.folds:
        fold = None if label == "main" else int(label)
        for task in peer.TASKS:
            found, cost = peer.predict(args.recording, task, fold, args.steps)
            figures = protocol.score(recording, task, found, "test", fold)
            size = f"{int(found['num_parameters']):,} parameters"
            shown = f"mdae_deg {figures['mdae_deg']:.2f}  r2_circ {figures['r2_circ']:.3f}"
            print(f"{label}  POYO  {task:10}  {shown}  {size}  {cost.cpu_s:.0f} CPU s", flush=True)
            if args.out is not None:
                protocol.save(args.out / recording.name / label / "POYO", task, found)


if __name__ == "__main__":
    main()
