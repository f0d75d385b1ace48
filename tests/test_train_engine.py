"""Every ds_config trains alike, resumes, and takes over what another has written; masters are fp32 everywhere.

In: the files of ds_configs/, on two ranks. Out: losses beside those of zero3.json, and what lies in checkpoints.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from safetensors import safe_open
from train_builders import ROOT, TINY, losses, prepare_run, tiny_run, tiny_store, train_several

from prep.settings import ConfigError
from train import engine
from train.build import build_model
from train.config import ModelConfig, RunConfig, deepspeed_config
from train.engine import Engine, parameter_groups

# hpZ is last: DeepSpeed makes its groups once in a process, and every later engine would use them.
STAGES = ("zero3", "zero1", "zero2", "zero3_offload", "zero3_hpz")
NUM_STEPS, SAVED_AT = 8, 5
# Of losses, in eight steps at a rate of 1e-4: 6e-7 between stages, 2e-5 for a rate of vectors that is wrong by 1 %.
ROUNDING = 2e-6


def with_mechanics(run: RunConfig, name: str, folder: Path) -> RunConfig:
    """The run under a file of ds_configs/, made to fit two ranks and a tiny model that is really partitioned."""
    mechanics = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    zero: dict[str, Any] = mechanics["zero_optimization"]
    if zero["stage"] == 3:
        zero["stage3_param_persistence_threshold"] = 200
    if "zero_hpz_partition_size" in zero:
        zero["zero_hpz_partition_size"] = 2
    if name == "zero3_nvme":  # DeepSpeed leaves in memory what is smaller than 1 MiB
        zero["offload_optimizer"]["nvme_path"] = str(folder / "nvme")
        zero["sub_group_size"] = 300_000
    path = folder / f"{name}.json"
    path.write_text(json.dumps(mechanics))
    return replace(run, ds_config=str(path), checkpoint_every=SAVED_AT)


def train_each(folder: Path, run: RunConfig, names: tuple[str, ...]) -> dict[str, Path]:
    """A run under each of these, one after the other on the same two ranks."""
    store = tiny_store(folder)
    runs = {name: prepare_run(folder / name, store, with_mechanics(run, name, folder)) for name in names}
    assert train_several([*runs.values()]) == 0
    return runs


def hand_round(runs: dict[str, Path], run: RunConfig, folder: Path) -> dict[str, Path]:
    """Each goes on from the checkpoint of the one before it."""
    store, names, resumed = tiny_store(folder), [*runs], {}
    for number, name in enumerate(names):
        giver, out = runs[names[number - 1]], folder / f"{name}-goes-on"
        resumed[name] = prepare_run(out, store, with_mechanics(run, name, folder))
        shutil.copytree(giver / "checkpoints" / f"step-{SAVED_AT:08d}", out / "checkpoints" / f"step-{SAVED_AT:08d}")
        shutil.copyfile(giver / "metrics.jsonl", out / "metrics.jsonl")
    assert train_several([*resumed.values()]) == 0
    return resumed


def difference(one: Path, other: Path) -> float:
    return max(abs(a - b) for a, b in zip(losses(one), losses(other), strict=True))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_stage_has_the_losses_of_zero3_and_resumes_from_any_other(tmp_path: Path) -> None:
    run = tiny_run(num_steps=NUM_STEPS, average_steps=6, vector_lr_scale=0.5, lr=1e-4)
    runs = train_each(tmp_path, run, STAGES)
    found = {name: difference(out, runs["zero3"]) for name, out in runs.items()}
    assert {name: found[name] < ROUNDING for name in STAGES} == dict.fromkeys(STAGES, True), found
    resumed = hand_round(runs, run, tmp_path)
    for name, out in resumed.items():
        assert difference(out, runs["zero3"]) < ROUNDING, name
    assert "resuming from" in (resumed["zero3"] / "logs" / "rank-00000.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_masters_are_fp32_in_every_stage_of_a_bf16_run(tmp_path: Path) -> None:
    runs = train_each(tmp_path, tiny_run(num_steps=3, precision="bf16"), STAGES)
    for name, out in runs.items():
        [folder] = (out / "checkpoints").iterdir()
        with safe_open(folder / "rank-00000.safetensors", "pt") as opened:
            kept = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  no dict
        assert {tensor.dtype for tensor in kept.values()} == {torch.float32}, name
        masters = [tensor for key, tensor in kept.items() if "|master|" in key]
        assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in masters), name


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not AsyncIOBuilder().is_compatible(), reason="DeepSpeed's async_io needs libaio-dev")
def test_optimizer_states_on_nvme_train_and_resume_like_those_in_memory(tmp_path: Path) -> None:
    wide = {**TINY, "hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 344}
    run = replace(tiny_run(num_steps=NUM_STEPS, lr=1e-4), model=ModelConfig(overrides=wide))
    runs = train_each(tmp_path, run, ("zero3", "zero3_nvme"))
    assert list((tmp_path / "nvme").rglob("*.swp")), "nothing was swapped out"
    assert difference(runs["zero3_nvme"], runs["zero3"]) < 1e-5
    for out in hand_round(runs, run, tmp_path).values():
        assert difference(out, runs["zero3"]) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_activations_that_are_computed_again_give_the_same_losses(tmp_path: Path) -> None:
    store = tiny_store(tmp_path)
    keeping = tiny_run(num_steps=5)
    keeping = replace(keeping, model=ModelConfig(overrides={**TINY, "hidden_dropout": 0.2}))
    again = replace(keeping, train=replace(keeping.train, activation_checkpointing=True))
    runs = [
        prepare_run(tmp_path / name, store, with_mechanics(run, stage, tmp_path))
        for name, run, stage in (("kept", keeping, "zero3"), ("again", again, "zero3"), ("again-1", again, "zero1"))
    ]
    assert train_several(runs) == 0
    assert losses(runs[1]) == losses(runs[0]) and difference(runs[2], runs[0]) < 1e-5


def test_vectors_have_a_learning_rate_of_their_own_and_do_not_decay() -> None:
    run = tiny_run(lr=1e-3, vector_lr_scale=0.25, weight_decay=0.1)
    matrices, vectors = parameter_groups(build_model(run), run.train)
    assert (matrices["lr"], matrices["weight_decay"], vectors["lr"], vectors["weight_decay"]) == (1e-3, 0.1, 2.5e-4, 0)
    assert {parameter.dim() for parameter in matrices["params"]} == {2} and len(vectors["params"]) > 10


def test_hpz_that_does_not_divide_the_ranks_is_refused(tmp_path: Path) -> None:
    run = with_mechanics(tiny_run(global_batch_size=6), "zero3_hpz", tmp_path)
    with pytest.raises(ConfigError, match=r"zero_hpz_partition_size 2 does not divide 3 ranks\. Change it\."):
        deepspeed_config(run, 3)


@pytest.mark.parametrize("key", ["compile", "activation_checkpointing", "scheduler"])
def test_mechanics_hold_nothing_that_belongs_to_the_run(tmp_path: Path, key: str) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({key: {}, "zero_optimization": {"stage": 3}}))
    with pytest.raises(ConfigError, match=f"{key} belongs to the run's YAML"):
        deepspeed_config(replace(tiny_run(), ds_config=str(path)), 1)


def test_nvme_without_its_library_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "AsyncIOBuilder", lambda: type("Builder", (), {"is_compatible": lambda self: False})())
    run = replace(tiny_run(), ds_config=str(ROOT / "ds_configs" / "zero3_nvme.json"))
    with pytest.raises(ConfigError, match=r"on NVMe, for which DeepSpeed compiles an op .* libaio-dev"):
        Engine(run, [], 1)
