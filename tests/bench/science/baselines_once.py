"""The table of the baselines of one recording.

In: a recording, folds (`main` is 70 / 10 / 20 %), a folder for the predictions. Out: a table on stdout, {task}.npz.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.science import protocol
from bench.science.baselines import baselines, pairs
from bench.science.recordings import NUM_FOLDS, Recording, read

SHOWN = {
    "hd": ("mdae_deg", "r2_circ"),
    "cosmooth": ("bps_train", "d2"),
    "forecast": ("bps_train", "bps_train_300-500ms"),
    "forecast_ca": ("skill_vs_persistence", "r"),
}


def show(recording: Recording, fold: int | None, out: Path | None) -> dict[str, dict[str, protocol.Prediction]]:
    """Train, score and print the baselines of one split."""
    cpu_s: dict[tuple[str, str], float] = {}
    found = baselines(recording, fold, cpu_s)
    for name, task in pairs(recording):
        prediction = found[name][task]
        figures = protocol.score(recording, task, prediction, "test", fold)
        shown = "  ".join(f"{key} {figures[key]:7.3f}" for key in SHOWN[protocol.KINDS[task]])
        print(f"{_label(fold)}  {name:6} {task:12} {shown}  {cpu_s[name, task]:6.1f} CPU s", flush=True)
        if out is not None:
            protocol.save(out / recording.name / _label(fold) / name, task, prediction)
    return found


def show_pooled(recording: Recording, folds: list[dict[str, dict[str, protocol.Prediction]]]) -> None:
    """Print the figures of all folds together."""
    for name, task in pairs(recording):
        figures = protocol.score_folds(recording, task, [fold[name][task] for fold in folds])
        shown = "  ".join(f"{key} {figures[key]:7.3f}" for key in SHOWN[protocol.KINDS[task]])
        print(f"pooled  {name:6} {task:12} {shown}", flush=True)


def _label(fold: int | None) -> str:
    return "main" if fold is None else f"fold{fold}"


def main() -> None:
    """Run the splits that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recording", type=Path)
    parser.add_argument("--folds", nargs="+", choices=["main", *map(str, range(NUM_FOLDS))], default=["main"])
    parser.add_argument("--out", type=Path, help="predictions go to OUT/recording/split/baseline/{task}.npz")
    args = parser.parse_args()
    torch.set_num_threads(1)
    recording = read(args.recording)
    folds = [None if fold == "main" else int(fold) for fold in args.folds]
    found = [show(recording, fold, args.out) for fold in folds]
    if folds == list(range(NUM_FOLDS)):
        show_pooled(recording, found)


if __name__ == "__main__":
    main()
