"""What ranks send, and how long a step takes: by hand for small numbers.

In: exchanges and jobs made for the test. Out: bytes and seconds.
"""

from dataclasses import replace
from typing import Any

import pytest

from prep.settings import ConfigError
from train.activations import Passes
from train.config import OptimConfig, RunConfig
from train.memory import Job, Zero
from train.traffic import Exchange, Machine, exchanges, laptop, num_buckets, pace

PASSES = Passes(rows=100, inputs=0, kept=0, most=0)


def a_job(nodes: int, slots: int, accumulation: int = 1, **zero: Any) -> Job:
    batch = nodes * slots * accumulation
    run = RunConfig(train=OptimConfig(precision="bf16", global_batch_size=batch, micro_batch_size=1))
    return Job(run=run, zero=Zero(**zero), nodes=nodes, slots=slots, num_rows=1000, on_cuda=True)


def payloads(job: Job) -> dict[str, float]:
    """Of the core, in whole models of bf16 weights."""
    found = [x for x in exchanges(job, PASSES) if "unit table" not in x.name and "single numbers" not in x.name]
    return {x.name: x.payload * x.times / (2 * job.num_parameters) for x in found}


def test_a_ring_sends_all_but_its_own_share_and_leaves_each_node_once() -> None:
    whole = Exchange("gather", 64e9, 1, "all")
    assert whole.sent(1, 8) == pytest.approx((56e9, 0))
    intra, inter = whole.sent(8, 8)
    assert intra + inter == pytest.approx(63e9), "64 GB, less its own sixty-fourth"
    assert 8 * inter == pytest.approx(63e9), "what leaves a node"


def test_pairs_of_ranks_send_to_all_alike() -> None:
    intra, inter = Exchange("rows", 64e9, 2, "pairs").sent(8, 8)
    assert (intra, inter) == pytest.approx((14e9, 112e9))


def test_a_round_of_a_ring_takes_the_messages_of_all_hops_but_one() -> None:
    ring, pairs, node = (Exchange("x", 1, 1, group, rounds=3) for group in ("all", "pairs", "node"))
    assert ring.hops(8, 8) == (56, 7) and ring.hops(1, 8) == (7, 0) and ring.hops(8, 1) == (0, 7)
    assert pairs.hops(8, 8) == (0, 1) and pairs.hops(1, 8) == (1, 0), "all of them at the same time"
    assert node.hops(8, 8) == (7, 0)
    machine = Machine(latency_intra=2, latency_inter=10, bandwidth_inter=1)
    assert ring.waiting(a_job(8, 8), machine) == pytest.approx(3 * (56 * 2 + 7 * 10) / 1e6)
    assert replace(ring, payload=8e9).seconds(a_job(8, 1), machine) == pytest.approx(3 * 7 * 10 / 1e6 + 7)


def test_parameters_are_sent_in_buckets() -> None:
    assert num_buckets([3, 3, 3, 3], 6) == 2 and num_buckets([3, 3, 3], 5) == 3 and num_buckets([9], 5) == 1
    assert num_buckets([3, 3, 3, 3], 5, over=True) == 2 and num_buckets([], 5) == 0


def test_what_stays_within_a_node_does_not_leave_it() -> None:
    assert Exchange("gather", 8e9, 1, "node").sent(8, 8) == pytest.approx((7e9, 0))


def test_a_rank_alone_sends_nothing() -> None:
    assert exchanges(a_job(1, 1, stage=3), PASSES) == []


@pytest.mark.parametrize(("stage", "reduced", "gathered"), [(0, 2, 0), (1, 2, 1), (2, 6, 1)])
def test_lower_stages_reduce_gradients_for_all(stage: int, reduced: float, gathered: float) -> None:
    """Once a step, or under ZeRO-2 in each of three micro-batches; weights are gathered after the step."""
    found = payloads(a_job(2, 2, accumulation=3, stage=stage))
    assert found["gradients, reduced for all"] == pytest.approx(reduced)
    assert found.get("weights, gathered after the step", 0) == pytest.approx(gathered)


def test_zero_3_gathers_for_each_pass_what_it_has_released() -> None:
    keeps, none = {"stage": 3}, {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    none |= {"stage": 3, "stage3_param_persistence_threshold": 0}
    released = payloads(a_job(2, 2, accumulation=3, **none))
    assert released == pytest.approx(
        {
            "weights, gathered for forward passes": 3,
            "weights, gathered for backward passes": 3,
            "gradients, scattered": 3,
        }
    )
    assert "weights, gathered for backward passes" not in payloads(a_job(2, 2, **keeps)), "a small model stays whole"


def test_a_second_partition_takes_all_but_the_first_gather_off_the_network() -> None:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "zero_hpz_partition_size": 8}
    zero |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    found = {x.name: x for x in exchanges(a_job(2, 8, accumulation=3, **zero), PASSES)}
    first = found["weights, gathered for the first forward pass"]
    others, backward = (found[f"weights, gathered for {x} passes"] for x in ("other forward", "backward"))
    assert (first.group, first.times) == ("all", 1)
    assert (others.group, others.times, backward.group, backward.times) == ("node", 2, "node", 3)


def test_rows_of_the_table_go_with_their_numbers_and_come_back_as_gradients() -> None:
    job = a_job(2, 2)
    rows = next(x for x in exchanges(job, PASSES) if "unit table" in x.name)
    assert rows.payload == 100 * (8 + 2 * 4 * job.config.unit_embed_size) and rows.group == "pairs"
    more = next(x for x in exchanges(a_job(2, 2, accumulation=30), PASSES) if "unit table" in x.name)
    assert more.payload == 10 * rows.payload and more.times == 1, "each of the thousand rows once a step"


def test_offloading_is_sent_to_the_host_and_to_the_disk() -> None:
    job = a_job(1, 1, stage=3, offload_optimizer="nvme")
    found = {x.group: x for x in exchanges(job, PASSES)}
    assert found["host"].payload == 4 * job.own and found["disk"].payload == 24 * job.own


def test_a_step_lies_between_all_hidden_and_nothing_hidden() -> None:
    job = a_job(2, 8, stage=3)
    machine = Machine(peak_tflops=100, mfu=0.5, bandwidth_intra=100, bandwidth_inter=10, bandwidth_host=1)
    sent = [Exchange("gather", 160e9, 1, "all"), Exchange("away", 2e9, 1, "host")]
    found = pace(job, machine, 16 * 50e12, sent)
    assert (found.compute_s, found.offload_s) == pytest.approx((1, 2))
    assert found.exchange_s == pytest.approx(150 / 8 / 10), "150 GB leave the node by eight cards, in no message"
    assert found.bounds_s == pytest.approx((1.875 + 2, 2.875 + 2))


def test_what_a_machine_can_do_is_more_than_nothing() -> None:
    with pytest.raises(ConfigError, match=r"^mfu = 0 must be more than 0\.$"):
        Machine(mfu=0)
    assert Machine(slack=0).slack == 0 and laptop(16).host_memory_gib == 16
