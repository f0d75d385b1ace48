"""What a forward pass costs: how time grows with the number of visible tokens, and what is no matrix product.

In: a preset, random windows of 64 to 4,096 units, 20 tokens each. Out: a table, the fitted exponent (at most 1.15 is
wanted), the share of time in other operations than matrix products and attention.

    .venv/bin/python tests/bench/model_cost.py [--preset debug] [--units 64 256 1024 4096] [--device cuda]
"""

import argparse
import math
import statistics
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from train.config import PRESETS
from train.flops import TOKENS_PER_S, Shape, forward_flops
from train.model.configuration_brainloom import BrainloomConfig
from train.model.modeling_brainloom import BrainloomForPreTraining

CONTEXT_S, BINS = 2.0, 5
TOKENS_PER_UNIT = round(CONTEXT_S * TOKENS_PER_S)
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "scaled_dot_product")  # parts of names of operations
WANTED = 1.15


def window(config: BrainloomConfig, units: int, device: str, context_s: float = CONTEXT_S) -> dict[str, Tensor]:
    """Spikes of `units`, all visible, a query for each token; batch size 1."""
    chance = torch.Generator().manual_seed(0)
    tokens_per_unit = round(context_s * TOKENS_PER_S)
    tokens, samples = units * tokens_per_unit, config.samples_per_token
    source = torch.arange(units).repeat(tokens_per_unit)
    start_s = torch.arange(tokens_per_unit).repeat_interleave(units) / TOKENS_PER_S
    observed = (torch.arange(samples) < BINS).expand(tokens, samples)
    counts = torch.poisson(torch.full((tokens, samples), 0.3), generator=chance)
    made: dict[str, Tensor] = {
        "unit_embeds": torch.randn(units, config.unit_embed_size, generator=chance),
        "unit_features": torch.randn(units, config.num_unit_features, generator=chance),
        "source_modality": torch.zeros(units, dtype=torch.int64),
        "source_null": torch.full((units,), 0.3),
        "input_values": (counts - 0.3) / math.sqrt(0.3),
        "input_observed": observed,
        "input_source": source,
        "input_time_s": start_s + 0.05,
        "input_start_s": start_s,
        "input_sample_s": torch.full((tokens,), 0.02),
        "input_mask": torch.ones(tokens, dtype=torch.bool),
        "pixels": torch.zeros(1, *config.image_size),
        "frame_time_s": torch.zeros(1),
        "frame_mask": torch.zeros(1, dtype=torch.bool),
        "query_source": source,
        "query_time_s": start_s,
        "query_sample_s": torch.full((tokens,), 0.02),
        "labels": counts,
        "label_mask": observed,
    }
    return {name: tensor[None].to(device) for name, tensor in made.items()}


def seconds(model: BrainloomForPreTraining, inputs: dict[str, Tensor], repeats: int) -> float:
    """Median time of a forward pass with loss."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        float(model(**inputs, context_s=CONTEXT_S).loss)  # waits for the device
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def share_outside_products(model: BrainloomForPreTraining, inputs: dict[str, Tensor], device: str) -> dict[str, Any]:
    """Share of time in operations that are no matrix product, and the dearest of them."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as measured:
        float(model(**inputs, context_s=CONTEXT_S).loss)
    attribute = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    spent = {event.key: float(getattr(event, attribute)) for event in measured.key_averages()}
    others = {name: us for name, us in spent.items() if not any(part in name for part in PRODUCTS)}
    dearest = sorted(others.items(), key=lambda item: -item[1])[:5]
    total = sum(spent.values())
    return {"share": sum(others.values()) / total, "dearest": [(name, us / total) for name, us in dearest]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--preset", choices=list(PRESETS), default="debug")
    parser.add_argument("--units", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    config = BrainloomConfig(**PRESETS[args.preset])
    model = BrainloomForPreTraining(config).to(args.device).eval()
    times = []
    print(f"{args.preset} on {args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, fp32")
    print(f"{'units':>6} {'tokens':>7} {'ms':>9} {'GFLOP':>8} {'GFLOP/s':>8} {'outside products':>17}")
    for units in args.units:
        inputs = window(config, units, args.device)
        with torch.inference_mode():
            times.append(seconds(model, inputs, args.repeats))
            outside = share_outside_products(model, inputs, args.device)
        shape = Shape(sources=units, tokens=units * TOKENS_PER_UNIT, frames=1, context_s=CONTEXT_S)
        work = sum(forward_flops(config, shape).values()) / 1e9
        print(
            f"{units:>6} {units * TOKENS_PER_UNIT:>7} {times[-1] * 1e3:>9.1f} {work:>8.2f} {work / times[-1]:>8.1f} "
            f"{outside['share']:>16.0%}",
            flush=True,
        )
    exponent = float(np.polyfit(np.log(args.units), np.log(times), 1)[0])
    upper = float(np.polyfit(np.log(args.units[-3:]), np.log(times[-3:]), 1)[0])
    print(f"time grows with tokens^{exponent:.2f} (the three largest alone: {upper:.2f}); wanted: at most {WANTED}")
    print("dearest outside products:", ", ".join(f"{name} {share:.0%}" for name, share in outside["dearest"]))


if __name__ == "__main__":
    main()
