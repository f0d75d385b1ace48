"""`make bench-gpu`: how much of a GPU the model uses, in bf16, compiled.

In: presets. Out: a section of tests/bench/RESULTS.md: the batch, time of a step, operations a second, the share of the
card's peak that they are (model FLOPs utilisation, Chowdhery 2022), memory.

A step is a forward and a backward pass of the whole model on windows with everything visible, as large as the preset's
run has them; its operations are those of train/flops.py, nothing is counted twice. The batch doubles until the memory
is full; the batch with the most operations a second is shown. There are two peaks: the data sheet's, and what a product
of two large matrices reaches on this very card. No optimizer, no ZeRO, no loader: these are `make train`'s to show.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench.model_cost import window
from bench.science import results
from torch import Tensor

from train.build import HALVED, model_config
from train.config import load
from train.flops import Shape, fullest_shape, training_flops
from train.model.modeling_brainloom import BrainloomForPreTraining
from train.usage import gpu_peak_flops

ROOT = Path(__file__).resolve().parents[2]
MATRIX = {"cuda": 8192, "cpu": 1024}
REPEATS = 5


@dataclass(frozen=True)
class Step:
    """One batch size, measured."""

    batch: int
    seconds: float
    flops: int  # operations of a step
    memory_bytes: int  # the most that was held; 0 on a CPU


def batch_of(preset: str, shape: Shape, device: str) -> dict[str, Tensor]:
    """Windows of spikes of all units, and frames, all visible."""
    config = model_config(load(ROOT / "train" / "configs" / f"{preset}.yaml"))
    inputs = window(config, shape.sources, device, shape.context_s)
    inputs["pixels"] = torch.zeros(1, shape.frames, *config.image_size, device=device)
    inputs["frame_time_s"] = torch.linspace(0, shape.context_s, shape.frames, device=device)[None]
    inputs["frame_mask"] = torch.ones(1, shape.frames, dtype=torch.bool, device=device)
    repeated = {name: x.repeat(shape.batch, *[1] * (x.dim() - 1)) for name, x in inputs.items()}
    return {name: x.bfloat16() if name in HALVED else x for name, x in repeated.items()}


def synchronise(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure(model: BrainloomForPreTraining, preset: str, shape: Shape, device: str, repeats: int = REPEATS) -> Step:
    """Median time of a forward and backward pass; raises torch.OutOfMemoryError."""
    inputs = batch_of(preset, shape, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats + 1):
        synchronise(device)
        began = time.perf_counter()
        model(**inputs, context_s=shape.context_s).loss.backward()
        synchronise(device)
        times.append(time.perf_counter() - began)
        model.zero_grad()
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return Step(shape.batch, statistics.median(times[1:]), sum(training_flops(model.config, shape).values()), memory)


def best(preset: str, device: str, compiled: bool, largest: int) -> Step:
    """The batch with the most operations a second, of 1, 2, 4, … as far as the memory goes."""
    run = load(ROOT / "train" / "configs" / f"{preset}.yaml")
    model = BrainloomForPreTraining(model_config(run)).to(device, torch.bfloat16)
    called = torch.compile(model, fullgraph=True) if compiled else model
    found: list[Step] = []
    batch = 1
    while batch <= largest:
        try:
            found.append(measure(called, preset, replace(fullest_shape(run, model.config), batch=batch), device))
        except torch.OutOfMemoryError:  # it is full: what was measured last is the largest
            break
        print(f"{preset}: {batch} windows, {found[-1].seconds * 1e3:,.1f} ms", flush=True)
        batch *= 2
    if not found:
        raise SystemExit(f"{preset} does not fit on this {device}, not even one window. Take a smaller preset.")
    return max(found, key=lambda step: step.flops / step.seconds)


def product_peak(device: str) -> float:
    """Operations a second of a product of two large matrices in bf16."""
    size = MATRIX[device]
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(REPEATS + 1):
        synchronise(device)
        began = time.perf_counter()
        torch.mm(left, right)
        synchronise(device)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times[1:])


def row(preset: str, step: Step, sheet: float | None, product: float) -> list[str]:
    """A line of the table."""
    rate = step.flops / step.seconds
    return [
        preset,
        f"{step.batch}",
        f"{step.seconds * 1e3:,.1f}",
        f"{rate / 1e12:,.2f}",
        f"{rate / sheet:.0%}" if sheet else "-",
        f"{rate / product:.0%}",
        f"{step.memory_bytes / 2**30:.1f}" if step.memory_bytes else "-",
    ]


HEAD = ["preset", "windows", "ms a step", "TFLOP/s", "of the data sheet", "of a matrix product", "GiB"]


def section(presets: list[str], device: str, compiled: bool, largest: int) -> str:
    """The text of the section."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    sheet = gpu_peak_flops(name)
    product = product_peak(device)
    rows = [row(preset, best(preset, device, compiled, largest), sheet, product) for preset in presets]
    how = "compiled, one graph" if compiled else "not compiled"
    parts = [
        "# What the model makes of a GPU",
        f"`make bench-gpu`, {date.today().isoformat()}. Written by the run; do not edit. {name}, "
        f"torch {version('torch')}, transformers {version('transformers')}; bf16, {how}.",
        f"Forward and backward pass, all units and frames of a window visible. A matrix product reaches "
        f"{product / 1e12:,.1f} TFLOP/s here.",
        results.table(HEAD, rows),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Measure, write, print; without a GPU it says so, and writes nothing."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--presets", nargs="+", default=["300m", "1b"], help="names in train/configs")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--largest", type=int, default=1024, help="windows of the largest batch that is tried")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "make bench-gpu needs a CUDA device, and torch sees none. That it runs: "
            'make bench-gpu ARGS="--device cpu --presets debug --largest 2"',
            file=sys.stderr,
        )
        return 2
    text = section(args.presets, args.device, not args.no_compile, args.largest)
    if args.device == "cuda":
        results.write_section(ROOT / "tests" / "bench" / "RESULTS.md", "make bench-gpu", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
