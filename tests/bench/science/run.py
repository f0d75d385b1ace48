"""`make bench-science`: Brainloom on a synthetic brain, and on real recordings beside regressions, networks and POYO.

In: the folder of real recordings (BRAINLOOM_NWB_DIR, or ../shared/nwb beside the repository). Out: predictions in
runs/bench-science/<recording>/<task>.npz, and three sections of tests/bench/RESULTS.md.
What is there already is not made again: a run that was interrupted goes on.
"""

import argparse
import os
import platform
import sys
import time
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from bench.science import brainloom, peer, pretrain, protocol, results, synthetic, windows
from bench.science.baselines import BASELINES, pairs
from bench.science.brainloom import ROOT, TASKS, Hub
from bench.science.recordings import NUM_FOLDS, Recording, read

OURS, PRETRAINED, POYO = "Brainloom", "Brainloom, pretrained", "POYO"
FIGURES = {  # kind of task: what is shown, and whether more is better
    "hd": {"mdae_deg": False, "r2_circ": True},
    "cosmooth": {"bps_train": True},
    "forecast": {"bps_train": True, "bps_train_300-500ms": True},
    "forecast_ca": {"skill_vs_persistence": True},
}
WORK = {OURS: "work", PRETRAINED: "work-pretrained"}
LIBRARIES = ("torch", "transformers", "deepspeed", "numpy", "zarr")


@dataclass
class Bench:
    """One recording: predictions by (model, task, fold), and what they took."""

    file: Path
    recording: Recording
    out: Path
    found: dict[tuple[str, str, int | None], protocol.Prediction] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def path(self, model: str, task: str, fold: int | None) -> Path:
        """Where a prediction lies."""
        return self.out / label(fold) / model / f"{task}.npz"

    def known(self, model: str, task: str, fold: int | None) -> bool:
        """Is it there already? Then it is read."""
        path = self.path(model, task, fold)
        if path.exists():
            self.found[model, task, fold] = protocol.load(path)
        return path.exists()

    def keep(self, model: str, task: str, fold: int | None, prediction: protocol.Prediction) -> None:
        """Save it."""
        self.found[model, task, fold] = prediction
        protocol.save(self.path(model, task, fold).parent, task, prediction)


def label(fold: int | None) -> str:
    """Name of a split."""
    return "main" if fold is None else f"fold{fold}"


def say(text: str) -> None:
    """Progress, at once."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def run_baselines(bench: Bench, fold: int | None) -> None:
    """Regressions and networks of one split."""
    for name, task in pairs(bench.recording):
        if bench.known(name, task, fold):
            continue
        said = BASELINES[name][task](bench.recording, task, fold)
        query = protocol.queries(bench.recording, task, "test", fold)
        bench.keep(name, task, fold, windows.answer(bench.recording, task, query, said))
        say(f"{bench.recording.name} {label(fold)}: {name} {task}")


def run_ours(bench: Bench, fold: int | None, name: str = OURS) -> None:
    """One checkpoint of one split, asked for every task."""
    tasks = TASKS[bench.recording.name]
    missing = [task for task in tasks if not bench.known(name, task, fold)]
    if not missing:
        return
    began, folder = time.perf_counter(), bench.out / label(fold) / WORK[name]
    hub = folder / "hub"
    if not (hub / "config.json").exists():
        begins = ("--hub", str(pretrain.pretrained(bench.file.parent, bench.out.parent))) if name == PRETRAINED else ()
        brainloom.train(bench.file, bench.recording, fold, folder, begins)
    loaded = Hub.load(hub)
    for task in missing:
        query = protocol.queries(bench.recording, task, "test", fold)
        bench.keep(name, task, fold, brainloom.predict(loaded, bench.recording, task, query))
    say(f"{bench.recording.name} {label(fold)}: {name} in {time.perf_counter() - began:.0f} s")


def run_poyo(bench: Bench, fold: int | None) -> None:
    """The peer on head direction; where it cannot be installed, the table says so."""
    for task in peer.TASKS if bench.recording.heading.size else ():
        if bench.known(POYO, task, fold):
            continue
        prediction, cost = peer.predict(bench.file, task, fold)
        bench.keep(POYO, task, fold, prediction)
        say(f"{bench.recording.name} {label(fold)}: {POYO} {task} in {cost.cpu_s:.0f} CPU s")


def origin() -> list[str]:
    """When, where and with what."""
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    machine = f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores, no GPU"
    return [
        f"`make bench-science`, {date.today().isoformat()}. Written by the run; do not edit.",
        f"{machine}. Python {platform.python_version()}, {libraries}.",
    ]


def section(benches: list[Bench], folds: list[int]) -> str:
    """The text of the section."""
    head = [
        "# Real recordings, by the fixed protocol",
        *origin(),
        "Brainloom: one checkpoint per recording and split, trained on the split's train blocks alone, asked as a hub "
        "folder (tests/bench/science/*.yaml; seed 0). Pretrained: the same, from the weights of a model of a synthetic "
        "brain and six other recordings (pretraining.yaml). MLP, GRU: a network per task (seed 0), and the mean of "
        "three. "
        f"POYO: {peer.POYO.unfair}. Intervals are of 95 %, over resampled segments of contiguous windows.",
    ]
    return "\n\n".join(head + [part for bench in benches for part in recording_parts(bench, folds)]) + "\n"


def recording_parts(bench: Bench, folds: list[int]) -> list[str]:
    """Tables of one recording."""
    parts = [f"## {bench.recording.name}", size_of(bench), results.table(*main_table(bench))]
    for ours in [name for name in (OURS, PRETRAINED) if any(name == other for other, _, _ in bench.found)]:
        parts += [f"{ours} minus the other, on the same windows:", results.table(*paired_table(bench, None, ours))]
        if folds == list(range(NUM_FOLDS)) and ours in models_of(bench, TASKS[bench.recording.name][0], folds):
            pooled = results.table(*paired_table(bench, folds, ours))
            parts += ["The same over five contiguous folds, pooled:", pooled]
    return parts


def size_of(bench: Bench) -> str:
    """Parameters of our model."""
    sizes = Hub.load(bench.out / "main" / "work" / "hub")
    core = sum(parameter.numel() for parameter in sizes.model.parameters())
    return f"Brainloom: {core:,} core parameters, {sizes.processor.units['weight'].numel():,} in the unit table."


def models_of(bench: Bench, task: str, folds: list[int] | None) -> list[str]:
    """Who answered the task, in every fold that is asked about."""
    wanted: list[int | None] = [None] if folds is None else list(folds)
    names = dict.fromkeys(name for name, other, _ in bench.found if other == task)
    return [name for name in names if all((name, task, fold) in bench.found for fold in wanted)]


def main_table(bench: Bench) -> tuple[list[str], list[list[str]]]:
    """Figures on the test block of the main split."""
    rows = []
    for task in TASKS[bench.recording.name]:
        for model in models_of(bench, task, None):
            figures = protocol.score(bench.recording, task, bench.found[model, task, None])
            spread = protocol.intervals(bench.recording, task, bench.found[model, task, None])
            for name in FIGURES[protocol.KINDS[task]]:
                low, high = spread[name]
                rows.append([task, model, name, f"{figures[name]:.3f}", f"{low:.3f} to {high:.3f}"])
    return ["task", "model", "figure", "test", "95 %"], rows


def paired_table(bench: Bench, folds: list[int] | None, ours: str) -> tuple[list[str], list[list[str]]]:
    """Differences, with who is better where the interval leaves out zero."""
    rows = []
    for task in TASKS[bench.recording.name]:
        for model in [name for name in models_of(bench, task, folds) if name != ours]:
            for name, more in FIGURES[protocol.KINDS[task]].items():
                value, low, high = difference(bench, task, (ours, model), folds)[name]
                better = low > 0 if more else high < 0
                worse = high < 0 if more else low > 0
                verdict = ours if better else model if worse else "not separable"
                rows.append([task, model, name, f"{value:+.3f}", f"{low:+.3f} to {high:+.3f}", verdict])
    return ["task", "against", "figure", "difference", "95 %", "better"], rows


def difference(
    bench: Bench, task: str, pair: tuple[str, str], folds: list[int] | None
) -> dict[str, tuple[float, float, float]]:
    """The first's minus the other's."""
    if folds is None:
        ours, theirs = (bench.found[name, task, None] for name in pair)
        return protocol.compare(bench.recording, task, ours, theirs)
    of_ours, of_theirs = ([bench.found[name, task, fold] for fold in folds] for name in pair)
    return protocol.compare_folds(bench.recording, task, of_ours, of_theirs)


def recordings_folder() -> Path:
    """Where the real recordings are."""
    folder = Path(os.environ.get("BRAINLOOM_NWB_DIR", ROOT.parent / "shared" / "nwb"))
    missing = [name for name in TASKS if not (folder / f"{name}.nwb").exists()]
    if missing:
        sys.exit(
            f"{folder} lacks {', '.join(f'{name}.nwb' for name in missing)}. Set BRAINLOOM_NWB_DIR to their folder."
        )
    return folder


def main() -> None:
    """Train, score, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["synthetic", "scaling", "real"], help="one of the three sections")
    parser.add_argument("--recordings", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--folds", nargs="*", type=int, default=list(range(NUM_FOLDS)), help="beside the main split")
    parser.add_argument("--no-poyo", action="store_true", help="leave out the peer, whose environment pip makes")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench-science")
    args = parser.parse_args()
    target = ROOT / "tests" / "bench" / "RESULTS.md"
    for name, section_of in (("synthetic", synthetic.section), ("scaling", synthetic.scaling_section)):
        if args.only in (None, name):
            text = section_of(args.out / "synthetic", origin())
            results.write_section(target, f"make bench-science, {name}", text)
    if args.only in ("synthetic", "scaling"):
        return
    torch.set_num_threads(1)
    folder, benches = recordings_folder(), []
    for name in args.recordings:
        bench = Bench(folder / f"{name}.nwb", read(folder / f"{name}.nwb"), args.out / name)
        for fold in [None, *args.folds]:
            run_baselines(bench, fold)
            run_ours(bench, fold)
            if name in pretrain.ASKED:
                run_ours(bench, fold, PRETRAINED)
            if not args.no_poyo:
                run_poyo(bench, fold)
        for task in TASKS[name]:
            protocol.save(bench.out, task, bench.found[OURS, task, None])
        benches.append(bench)
    text = section(benches, args.folds)
    results.write_section(target, "make bench-science", text)
    print(text)


if __name__ == "__main__":
    main()
