"""What the size of the unit table costs: steps with 3,000,000 units beside steps with 3,000, in alternating turns.

In: two tables, the debug model, random windows that use as many rows of either. Out: a row for the table alone and one
for the whole step: medians, and the median of the ratios of paired turns (at most 1.05 is wanted of the whole step).
One thread, and the time that this process has the processor: what else runs on the machine is not counted.

    .venv/bin/python tests/bench/unit_table.py [--units 3000 3000000] [--turns 40]
"""

import argparse
import statistics
import time

import torch
from model_cost import window
from torch import Tensor, nn

from train.config import PRESETS
from train.model.configuration_brainloom import BrainloomConfig
from train.model.modeling_brainloom import BrainloomForPreTraining
from train.unit_table import UnitTable

BATCH, UNITS, CONTEXT_S, LR = 16, 64, 1.0, 0.1
WANTED = 1.05


def timed_step(
    table: UnitTable, rows: Tensor, number: int, model: nn.Module | None, inputs: dict[str, Tensor]
) -> float:
    """Seconds of one step: of table and model, or of the table alone."""
    began = time.process_time()
    table.fetch(rows)
    embeds = table.lookup(rows)
    if model is None:
        embeds.sum().backward()
    else:
        model(unit_embeds=embeds, context_s=CONTEXT_S, **inputs).loss.backward()
    table.step(LR, number)
    return time.process_time() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--units", type=int, nargs=2, default=[3_000, 3_000_000])
    parser.add_argument("--turns", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = BrainloomConfig(**PRESETS["debug"])
    one = window(config, UNITS, "cpu", CONTEXT_S)
    inputs = {name: tensor.expand(BATCH, *tensor.shape[1:]) for name, tensor in one.items() if name != "unit_embeds"}
    tables = []
    for num_units in args.units:
        began = time.perf_counter()
        tables.append(UnitTable([f"d/s/{i}" for i in range(num_units)], config.unit_embed_size, torch.device("cpu")))
        print(f"{num_units:,} units: {time.perf_counter() - began:.1f} s to draw", flush=True)
    print(f"E = {config.unit_embed_size}, {BATCH} windows of {UNITS} units, torch {torch.__version__}")
    chance = torch.Generator().manual_seed(0)
    for name, model in (("table alone", None), ("step, debug preset", BrainloomForPreTraining(config))):
        pairs = []
        for turn in range(args.turns + 2):
            # As many different rows of either table: what is compared is how many it has, not how many are used.
            rows = [
                torch.randperm(len(table), generator=chance)[: BATCH * UNITS].view(BATCH, UNITS) for table in tables
            ]
            order = (0, 1) if turn % 2 else (1, 0)
            seconds = {which: timed_step(tables[which], rows[which], turn + 1, model, inputs) for which in order}
            pairs.append((seconds[0], seconds[1]))
        small, large = (statistics.median(column) * 1e3 for column in zip(*pairs[2:], strict=True))
        ratio = statistics.median(b / a for a, b in pairs[2:])
        print(f"{name}: {small:.2f} ms and {large:.2f} ms, ratio {ratio:.3f} (of a step at most {WANTED} is wanted)")


if __name__ == "__main__":
    main()
