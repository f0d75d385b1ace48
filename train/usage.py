"""What a step used: tokens, seconds of units, operations, memory.

In: a batch of one rank, the name of its device. Out: numbers that the loop adds up over ranks.
"""

import resource
import sys

import torch
from torch import Tensor

from prep.settings import ACTIVITY
from train.config import RunConfig
from train.flops import Shape, training_flops
from train.model.configuration_brainloom import BrainloomConfig
from train.model.decoder_brainloom import NUM_FOLDS

# Dense bf16 operations a second, by the data sheets; the first name that is part of the device's counts.
PEAKS = {
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def of_step(micro_batches: list[dict[str, Tensor]], context_s: float, model: BrainloomConfig) -> dict[str, float]:
    """Tokens, hours of units, and operations by formula, of one rank's part of a step."""
    shapes = [mean_shape(batch, context_s) for batch in micro_batches]
    return {
        "tokens": float(sum(batch_tokens(batch) for batch in micro_batches)),
        "unit_hours": sum(num_units(batch) for batch in micro_batches) * context_s / 3600,
        "flops": float(sum(sum(training_flops(model, shape).values()) for shape in shapes)),
    }


def batch_tokens(batch: dict[str, Tensor]) -> int:
    """Visible tokens and asked tokens of a batch."""
    return int(batch["input_mask"].sum() + batch["label_mask"].any(-1).sum())


def num_units(batch: dict[str, Tensor]) -> int:
    """Units of which a token is visible or asked, summed over the windows of a batch."""
    used = torch.zeros_like(batch["source_modality"], dtype=torch.bool)
    asked = batch["label_mask"].any(-1)
    for source, mask in ((batch["input_source"], batch["input_mask"]), (batch["query_source"], asked)):
        window, place = mask.nonzero(as_tuple=True)
        used[window, source[window, place]] = True
    return int((used & (batch["source_modality"] < len(ACTIVITY))).sum())


def mean_shape(batch: dict[str, Tensor], context_s: float) -> Shape:
    """What the windows of a batch hold on average, its padding left out: operations are linear in it."""
    size = len(batch["input_mask"])
    return Shape(
        batch=size,
        sources=batch["source_modality"].shape[1],
        tokens=round(int(batch["input_mask"].sum()) / size),
        frames=round(int(batch["frame_mask"].sum()) / size),
        context_s=context_s,
        folds=NUM_FOLDS if "source_fold" in batch else 0,
    )


def peak_flops(run: RunConfig, device: torch.device) -> float | None:
    """Operations a second that the device can do: `peak_tflops`, else of a known GPU in bf16, else not known."""
    if run.peak_tflops:
        return run.peak_tflops * 1e12
    if device.type != "cuda" or run.train.precision != "bf16":
        return None
    return gpu_peak_flops(torch.cuda.get_device_name(device))


def gpu_peak_flops(name: str) -> float | None:
    """Dense bf16 operations a second of a GPU, as its data sheet has them."""
    return next((peak for card, peak in PEAKS.items() if card in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this rank has held: tensors on a GPU, else the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024
