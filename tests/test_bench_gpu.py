"""The bench of a GPU, on a CPU: what it counts, and that it says so where there is no GPU.

In: the smallest preset. Out: a table's row.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from bench import gpu
from train_builders import ROOT

from train.build import model_config
from train.config import load
from train.flops import fullest_shape, training_flops
from train.model.modeling_brainloom import BrainloomForPreTraining

NO_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def step() -> gpu.Step:
    run = load(ROOT / "train" / "configs" / "debug.yaml")
    model = BrainloomForPreTraining(model_config(run)).to(torch.bfloat16)
    shape = replace(fullest_shape(run, model.config), batch=2)
    return gpu.measure(model, "debug", shape, "cpu", repeats=1)


def test_a_step_is_counted_by_the_formulas(step: gpu.Step) -> None:
    run = load(ROOT / "train" / "configs" / "debug.yaml")
    config = model_config(run)
    assert step.flops == 2 * sum(training_flops(config, fullest_shape(run, config)).values())
    assert step.batch == 2 and step.seconds > 0


def test_the_inputs_are_as_large_as_the_formulas_say() -> None:
    run = load(ROOT / "train" / "configs" / "debug.yaml")
    shape = replace(fullest_shape(run, model_config(run)), batch=3)
    inputs = gpu.batch_of("debug", shape, "cpu")
    assert inputs["input_values"].shape[:2] == (3, shape.tokens)
    assert inputs["pixels"].shape[:2] == (3, shape.frames) and bool(inputs["frame_mask"].all())
    assert inputs["source_modality"].shape == (3, shape.sources)


def test_a_row_gives_shares_of_both_peaks() -> None:
    found = gpu.Step(batch=8, seconds=0.1, flops=int(40e12), memory_bytes=3 * 2**30)
    assert gpu.row("300m", found, 989e12, 800e12) == ["300m", "8", "100.0", "400.00", "40%", "50%", "3.0"]
    assert gpu.row("300m", found, None, 800e12)[4] == "-", "a card whose data sheet is not known"


def test_without_a_gpu_it_says_what_to_do_and_writes_nothing() -> None:
    before = (ROOT / "tests" / "bench" / "RESULTS.md").read_bytes()
    done = subprocess.run([sys.executable, "tests/bench/gpu.py"], cwd=ROOT, capture_output=True, text=True, env=NO_GPU)
    assert done.returncode == 2 and "needs a CUDA device, and torch sees none" in done.stderr
    assert (ROOT / "tests" / "bench" / "RESULTS.md").read_bytes() == before
