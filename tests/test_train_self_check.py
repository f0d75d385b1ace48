"""The start-up self-check: an odd rank is named, with what is odd; a rank that does not come is named, too.

In: what ranks say of themselves, threads and processes that are ranks, models with planted branches. Out: messages.
"""

import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from train_builders import handmade_run, tiny_run, tiny_store, train_ranks

from prep.store import Store
from train import self_check, supervise
from train.__main__ import USAGE
from train.build import build_model, model_config, whole
from train.loader import TrainingSamples
from train.model.modeling_brainloom import BrainloomEncoder, BrainloomIdentity
from train.module_trace import module_traces
from train.self_check import Peers, SelfCheckError, differences, surroundings, weights

# A rank 1 that takes the keys of what it reads from the projection of the gates: the same shape, other weights.
PLANTED = """
import os, sys
from train.model.modeling_brainloom import BrainloomEncoder
if os.environ["RANK"] == "1":
    BrainloomEncoder._keys = lambda self, x: (self.k_norm(self.gate_proj(x).unflatten(-1, self.heads))).flatten(2)
"""
# A rank 1 that has restored one small parameter, of which every rank keeps a whole copy, a little wrong.
SPOILT = """
import os, sys
from train import loop
resume = loop._resume
def resume_and_spoil(engine, *more):
    step = resume(engine, *more)
    if os.environ["RANK"] == "1":
        engine.model.model.norm.weight.data[5] += 1e-6
    return step
loop._resume = resume_and_spoil
"""
START = """
from train.__main__ import main
sys.exit(main(["worker", "--out", sys.argv[2]]))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def samples(store: Path) -> TrainingSamples:
    run = tiny_run()
    return TrainingSamples(store, run, model_config(run))


def test_what_is_the_same_on_all_ranks_is_not_mentioned() -> None:
    assert differences({rank: {"store": ["abc"], "code": ["a", "b"]} for rank in range(3)}) == ""


def test_the_odd_rank_is_named_with_its_first_odd_line_and_what_to_do() -> None:
    found = {rank: {"store": ["abc"], "code": ["train/a.py 1", "train/b.py 2"]} for rank in range(4)}
    found[2]["code"] = ["train/a.py 1", "train/b.py 9", "train/c.py 3"]
    assert differences(found) == (
        "the start-up self-check found ranks that differ:\n"
        "code, line 2: rank 2 has `train/b.py 9`, ranks 0, 1, 3 have `train/b.py 2`. "
        "Bring all hosts to the same revision."
    )


def test_of_two_ranks_both_are_named_and_a_line_that_is_missing_is_nothing() -> None:
    said = differences({0: {"weights": ["a 1"]}, 1: {"weights": ["a 1", "b 2"]}})
    assert "weights, line 2: rank 0 has nothing more, rank 1 has `b 2`." in said
    assert "start, line 1: rank 0 has nothing more, rank 1 has `step 5`." in differences(
        {0: {}, 1: {"start": ["step 5"]}}
    )


def test_many_odd_ranks_are_abbreviated_and_every_topic_is_told() -> None:
    found = {rank: {"store": [str(rank % 2)], "start": [f"step {rank > 2}"]} for rank in range(24)}
    said = differences(found)
    assert "ranks 1, 3, 5, 7, 9, 11, 13, 15, …" in said and "start, line 1: ranks 0, 1, 2 have `step False`" in said


def as_ranks(number: int, monkeypatch: pytest.MonkeyPatch, of_rank: Callable[[Peers], None]) -> list[str]:
    """Run a function as each rank, in a thread; what each was told, or "" where all was well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    said = [""] * number

    def one(rank: int) -> None:
        try:
            of_rank(Peers(rank, number, patience_s=2.0))
        except SelfCheckError as error:
            said[rank] = str(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_all_ranks_hear_the_same_and_may_check_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(peers: Peers) -> None:
        peers.agree({"store": ["abc"]})
        peers.agree({"start": [f"step {5 * (peers.rank == 2)}"]})

    said = as_ranks(3, monkeypatch, check)
    assert len(set(said)) == 1
    assert (
        "start, line 1: rank 2 has `step 5`, ranks 0, 1 have `step 0`. Every host must see the same checkp" in said[0]
    )


def test_a_rank_that_does_not_come_is_named_within_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "LEAVING", self_check.timedelta(seconds=0.2))
    said = as_ranks(6, monkeypatch, lambda peers: peers.agree({"store": ["abc"]}) if peers.rank in (0, 2) else None)
    assert said[0] == said[2] and said[1] == ""
    assert said[0].startswith("ranks 1, 3, 4, 5 of 6 did not come to the start-up self-check within 2 s. See the logs")


def test_without_rank_0_the_others_say_so_and_are_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "9")  # discard: nobody listens
    with pytest.raises(SelfCheckError, match=r"rank 1: rank 0 does not answer at 127.0.0.1:9 within 1 s. See its log"):
        Peers(1, 2, patience_s=1.0)
    assert supervise.VICTIM.search("rank 1: rank 0 does not answer any more. See its log.")


def test_surroundings_tell_versions_code_configuration_and_store(store: Path) -> None:
    run = tiny_run()
    told = surroundings(run, Store(store).digest(), 2)
    assert f"torch {torch.__version__}".split("+")[0] in " ".join(told["versions"])
    assert "train.global_batch_size = 4" in told["configuration"]
    assert "ds_config.zero_optimization.stage = 3" in told["configuration"]
    assert any(line.startswith("train/self_check.py ") for line in told["code"])
    other = surroundings(replace(run, seed=4), Store(store).digest(), 2)
    assert "line 1: rank 0 has `seed = 3`, rank 1 has `seed = 4`" in differences({0: told, 1: other})


def test_the_weights_name_the_parameter_that_is_odd() -> None:
    run = tiny_run()
    model, other = build_model(run), build_model(run)
    assert weights(model, whole) == weights(other, whole)
    with torch.no_grad():
        other.model.encoder.o_proj.weight[3, 4] += 1e-3
    said = differences({0: {"weights": weights(model, whole)}, 1: {"weights": weights(other, whole)}})
    assert "rank 1 has `model.encoder.o_proj.weight [32, 32] torch.float32 " in said


# ---------------------------------------------------------------- the module trace


def test_ranks_with_different_data_have_the_same_trace(samples: TrainingSamples) -> None:
    two = [module_traces(samples, rank, 2) for rank in range(2)]
    assert two[0] == two[1] and len(two[0]) == len(samples.config.turns)
    lines = two[0]["modules of encoding@1"]
    names = dict(build_model(samples.config).named_parameters())
    assert {f"has the gradient of {name}" for name in names} <= set(lines)
    assert "calls model.layers.1.self_attn" in lines


def test_the_trace_leaves_the_chance_of_the_run_alone(samples: TrainingSamples) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    module_traces(samples, 0, 2)
    assert torch.equal(torch.rand(3), expected)


def _other_weights(self: BrainloomEncoder, x: Tensor) -> Tensor:
    return self.k_norm(self.gate_proj(x).unflatten(-1, self.heads)).flatten(2)


def _skips(self: BrainloomIdentity, embeds: Tensor, features: Tensor, modality: Tensor) -> tuple[Tensor, Tensor]:
    if (modality == 1).any():  # traces: their identity needs no features
        return self.out_proj(embeds) + self.modality_embed[modality], embeds
    return BRANCH(self, embeds, features, modality)


def _unused(self: BrainloomIdentity, embeds: Tensor, features: Tensor, modality: Tensor) -> tuple[Tensor, Tensor]:
    self.feature_out(nn.functional.silu(self.feature_proj(features)))
    return self.out_proj(embeds) + self.modality_embed[modality], embeds


BRANCH = BrainloomIdentity.forward


@pytest.mark.parametrize(
    ("owner", "name", "planted", "seen"),
    [
        (BrainloomEncoder, "_keys", _other_weights, "rank 1 has `calls model.encoder.gate_proj`"),
        (BrainloomIdentity, "forward", _skips, "rank 1 has `calls model.identity.out_proj`"),
        (BrainloomIdentity, "forward", _unused, "of model.identity.feature_"),
    ],
)
def test_a_branch_of_one_rank_is_seen(
    samples: TrainingSamples,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    name: str,
    planted: Callable[..., Tensor],
    seen: str,
) -> None:
    """Another module with the same shapes; a branch that is left out for some data; one whose output is not used."""
    found = {0: module_traces(samples, 0, 2)}
    monkeypatch.setattr(owner, name, planted)
    found[1] = module_traces(samples, 1, 2)
    said = differences(found)
    assert seen in said and "Every rank must run every branch" in said


@pytest.mark.parametrize(
    ("planted", "seen"),
    [
        (PLANTED, "rank 1 has `calls model.encoder.gate_proj`"),
        pytest.param(SPOILT, "rank 1 has `model.norm.weight [32] torch.float32 ", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_is_odd_ends_the_run_at_start_up_with_its_name(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], planted: str, seen: str
) -> None:
    out = tmp_path / "planted"
    handmade_run(out, store, tiny_run())
    assert train_ranks(out, command=[sys.executable, "-c", planted + START, "worker", str(out)]) == USAGE
    for rank in range(2):
        log = (out / "logs" / f"rank-{rank:05d}.log").read_text()
        assert "train worker: the start-up self-check found ranks that differ:" in log
        assert seen in log and "Traceback" not in log
    assert "self-check" in capfd.readouterr().err
    assert not (out / "metrics.jsonl").exists()
