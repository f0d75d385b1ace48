"""Muon: what is orthogonal about it, that it moves as torch's does, and the same on any number of ranks.

In: matrices, tiny runs under several ZeRO stages. Out: singular values; updates; losses.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train_engine import NUM_STEPS, difference, hand_round, train_each
from torch import nn
from train_builders import losses, prepare_run, tiny_run, tiny_store, train_ranks

from prep.settings import ConfigError
from prep.store import Store
from train import muon
from train.config import OptimConfig, deepspeed_config
from train.engine import make_optimizer
from train.muon import MATRICES, Matrix, is_matrix, orthogonal
from train.partitions import Piece
from train.start import prepare


@pytest.mark.parametrize("shape", [(64, 64), (32, 200), (200, 32)])
def test_all_singular_values_come_out_near_one_in_the_same_directions(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.linspace(0.2, 5, min(shape))
    found = orthogonal(left @ values.diag() @ right)
    assert found.shape == shape
    core = left.T @ found @ right.T
    assert (core - core.diagonal().diag()).abs().max() < 1e-4
    assert core.diagonal().min() > 0.6 and core.diagonal().max() < 1.3


def test_matrices_are_under_way_as_many_as_ranks_or_more_where_they_are_small() -> None:
    large, small = muon.ROUND_SIZE, muon.ROUND_SIZE // 4
    sizes = [small, small, small, small, small, large, large, large]
    assert muon.rounds(sizes, 2) == [slice(0, 4), slice(4, 6), slice(6, 8)]
    assert muon.rounds(sizes, 8) == [slice(0, 8)] and muon.rounds([], 2) == []


def test_what_does_not_move_has_no_direction() -> None:
    assert torch.equal(orthogonal(torch.zeros(32, 40)), torch.zeros(32, 40))


def test_embeddings_vectors_and_thin_matrices_are_adams() -> None:
    assert is_matrix("layers.0.mlp.up_proj.weight", (344, 128))
    assert not is_matrix("layers.0.norm.weight", (128,)) and not is_matrix("gap_proj.weight", (128, 2))
    assert not is_matrix("modality_embed", (64, 128))


class Two(nn.Module):
    """A matrix and a vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.weight = nn.Parameter(torch.randn(48, 80))
        self.bias = nn.Parameter(torch.randn(48))


def test_a_matrix_moves_as_torchs_muon_moves_it_and_a_vector_as_adamw_does(monkeypatch: pytest.MonkeyPatch) -> None:
    config = OptimConfig(optimizer="muon", lr=0.02, weight_decay=0.1)
    ours, theirs = Two(), Two()
    optimizer = make_optimizer(ours, config)
    whole = Matrix((48, 80), Piece("weight", 0, 48 * 80, 0), is_cut=False)
    [group] = [group for group in optimizer.param_groups if group["name"] == MATRICES]
    flat = nn.Parameter(ours.weight.detach().reshape(-1).clone())
    group["params"] = [flat]  # as ZeRO hands it to an optimizer
    monkeypatch.setattr(optimizer, "_matrices", {flat: [whole]})
    matrix = torch.optim.Muon(
        [theirs.weight], lr=0.02, weight_decay=0.1, momentum=muon.MOMENTUM, adjust_lr_fn="match_rms_adamw"
    )
    vector = torch.optim.AdamW([theirs.bias], lr=0.02, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(3):
        torch.manual_seed(step)
        gradient = torch.randn(48, 80)
        flat.grad, ours.bias.grad = gradient.reshape(-1).clone(), torch.ones(48)
        theirs.weight.grad, theirs.bias.grad = gradient.clone(), torch.ones(48)
        for each in (optimizer, matrix, vector):
            each.step()
    moved, expected = flat.detach().view(48, 80) - Two().weight, theirs.weight.detach() - Two().weight
    assert ((moved - expected).norm() / expected.norm()) < 0.02, "torch computes the direction in bfloat16"
    assert torch.equal(ours.bias, theirs.bias)


def test_two_ranks_move_as_one_does(tmp_path: Path) -> None:
    store, run = tiny_store(tmp_path), tiny_run(optimizer="muon", num_steps=6)
    one, two = (prepare_run(tmp_path / name, store, run) for name in ("one", "two"))
    assert train_ranks(one, slots=1) == 0 and train_ranks(two, slots=2) == 0
    assert difference(one, two) < 1e-5


@pytest.mark.slow
def test_a_run_that_was_interrupted_goes_on_to_the_last_bit_and_is_not_adamws(tmp_path: Path) -> None:
    store, run = tiny_store(tmp_path), replace(tiny_run(optimizer="muon", num_steps=6), checkpoint_every=3)
    one, half = (prepare_run(tmp_path / name, store, run) for name in ("one", "half"))
    assert train_ranks(one, slots=1) == 0
    step = Path("checkpoints") / "step-00000003"
    shutil.copytree(one / step, half / step)
    shutil.copyfile(one / "metrics.jsonl", half / "metrics.jsonl")
    assert train_ranks(half, slots=1) == 0
    assert losses(half) == losses(one)
    adamw = prepare_run(tmp_path / "adamw", store, replace(run, train=replace(run.train, optimizer="adamw")))
    assert train_ranks(adamw, slots=1) == 0
    assert difference(one, adamw) > 1e-4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_muon_has_the_same_losses_under_every_stage_and_resumes_from_any_other(tmp_path: Path) -> None:
    stages = ("zero3", "zero1", "zero2")
    run = tiny_run(optimizer="muon", num_steps=NUM_STEPS, average_steps=6)
    runs = train_each(tmp_path, run, stages)
    for out in (*runs.values(), *hand_round(runs, run, tmp_path).values()):
        assert difference(out, runs["zero3"]) < 1e-5, out


def test_muon_is_not_for_states_off_the_gpu_and_a_run_keeps_its_optimizer(tmp_path: Path) -> None:
    run = tiny_run(optimizer="muon")
    with pytest.raises(ConfigError, match=r"keeps the optimizer's states off the GPU, where train\.optimizer=muon"):
        deepspeed_config(replace(run, ds_config="ds_configs/zero3_offload.json"), 2)
    store = tiny_store(tmp_path)
    out = prepare_run(tmp_path / "run", store, run)
    (out / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(
        ConfigError, match=r"has trained by muon, whose moments are not those of adamw\. Set train\.opt"
    ):
        prepare(tiny_run(), Store(store), out)
