"""Memory by part: what each way of ZeRO keeps where, term by term.

In: presets under mechanics made for the test. Out: bytes, against what the ways promise. test_train_dry_run_peak.py
holds their sum against real runs.
"""

from typing import Any

import pytest
from train_builders import ROOT

from train.activations import Passes
from train.build import model_config
from train.config import OptimConfig, RunConfig, load
from train.flops import parameters
from train.memory import MOMENTS, Job, Part, Zero, most, parts

PASSES = Passes(rows=100, inputs=1000, kept=5_000_000, most=7_000_000)


def a_job(nodes: int = 1, slots: int = 1, on_cuda: bool = True, train: OptimConfig | None = None, **zero: Any) -> Job:
    run = RunConfig(train=train or OptimConfig(precision="bf16", global_batch_size=1024, micro_batch_size=1))
    return Job(run=run, zero=Zero(**zero), nodes=nodes, slots=slots, num_rows=10_000, on_cuda=on_cuda)


def by_name(job: Job) -> dict[str, Part]:
    found = parts(job, PASSES)
    assert len({part.name for part in found}) == len(found)
    return {part.name: part for part in found}


def test_the_defaults_are_those_of_deepspeed() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs, ours = DeepSpeedZeroConfig(), Zero()
    for name in vars(ours):
        if not name.startswith("offload") and name != "overlap_comm":
            assert getattr(ours, name) == getattr(theirs, name.removeprefix("stage3_")), name
    for stage in range(4):
        assert Zero(stage=stage).overlaps == DeepSpeedZeroConfig(stage=stage).overlap_comm


def test_mechanics_are_read_from_the_whole_file() -> None:
    section = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}, "contiguous_gradients": True}
    assert Zero.of({"zero_optimization": section, "steps_per_print": 1}) == Zero(stage=3, offload_optimizer="nvme")


def test_parameters_are_those_of_the_formula() -> None:
    job = a_job()
    assert job.num_parameters == pytest.approx(sum(parameters(job.config).values()), rel=0.02)


@pytest.mark.parametrize(
    ("stage", "whole", "cut"),
    [
        (1, ["working weights"], ["master weights", "moments of Adam"]),
        (2, ["working weights"], ["gradients", "master weights", "moments of Adam"]),
        (3, [], ["working weights", "gradients", "master weights", "moments of Adam"]),
    ],
)
def test_each_stage_cuts_one_thing_more_into_as_many_pieces_as_ranks(
    stage: int, whole: list[str], cut: list[str]
) -> None:
    one, many = by_name(a_job(stage=stage)), by_name(a_job(nodes=2, slots=8, stage=stage))
    for name in whole:
        assert many[name].step == one[name].step > 0
    for name in cut:
        assert many[name].step == pytest.approx(one[name].step / 16, rel=1e-3)
    assert many["gradients"].reduction == pytest.approx(one["gradients"].reduction / (16 if stage > 1 else 1), rel=1e-3)


def test_states_are_sixteen_bytes_a_parameter_in_all() -> None:
    """Two of weights, two of gradients, four of masters, eight of moments: Rajbhandari 2020, but for bf16 gradients."""
    found, job = by_name(a_job(stage=3)), a_job()
    states = ("working weights", "gradients", "master weights", "moments of Adam")
    assert sum(found[name].step for name in states) == 16 * job.num_parameters


def test_rows_of_the_unit_table_fall_as_the_number_of_ranks_rises() -> None:
    one, many = (by_name(a_job(slots=slots, stage=3))["unit table, rows held"].step for slots in (1, 16))
    everywhere = 8 * 10_000  # which rank holds each
    assert many - everywhere == pytest.approx((one - everywhere) / 16)


def test_an_average_of_the_weights_is_a_copy_more_of_the_core_and_of_the_table() -> None:
    train = OptimConfig(precision="bf16", global_batch_size=1024, micro_batch_size=1, average_steps=10)
    without, with_it = by_name(a_job(stage=3)), by_name(a_job(stage=3, train=train))
    assert with_it["average of the weights"].step == with_it["master weights"].step
    assert with_it["copy for checkpoints"].step == pytest.approx(without["copy for checkpoints"].step * 4 / 3)
    assert "average of the weights" not in without


def test_offloaded_states_leave_the_gpu_for_the_host_or_the_disk() -> None:
    near, host, disk = (by_name(a_job(slots=8, stage=3, offload_optimizer=x)) for x in ("none", "cpu", "nvme"))
    for name in ("master weights", "moments of Adam"):
        assert [found[name].place for found in (near, host, disk)] == ["device", "host", "disk"]
    assert host["gradients"].place == disk["gradients"].place == "host"
    on_gpu = [most([*found.values()], "device") for found in (near, host)]
    assert on_gpu[1] < on_gpu[0]
    weights = by_name(a_job(slots=8, stage=3, offload_param="cpu"))["working weights"]
    assert weights.place == "host"


def test_parameters_are_gathered_where_there_are_several_ranks() -> None:
    job = a_job(slots=8, stage=3)
    found = by_name(job)
    whole = found["parameters always whole"].passes + found["parameters gathered"].passes
    assert whole == 2 * job.num_parameters, "a small model is whole at the turn"
    assert found["parameters always whole"].step > 0 == found["parameters gathered"].step
    assert "parameters gathered" not in by_name(a_job(stage=3)), "one rank alone looks at its own"
    assert "parameters gathered" not in by_name(a_job(slots=8, stage=2))
    tight = by_name(a_job(slots=8, stage=3, stage3_max_live_parameters=3e5, stage3_max_reuse_distance=1e5))
    assert tight["parameters gathered"].passes == 2 * 3e5


def test_the_second_partition_is_of_the_ranks_of_a_node() -> None:
    job = a_job(nodes=2, slots=8, stage=3, zero_hpz_partition_size=8)
    second = by_name(job)["second partition, of the node"]
    assert second.passes == pytest.approx(2 * job.num_parameters / 8, rel=1e-3) and second.step == 0


def test_a_gpu_gives_the_whole_bucket_and_a_cpu_what_is_written() -> None:
    gpu, cpu = (by_name(a_job(stage=3, on_cuda=where))["bucket of gradients"].step for where in (True, False))
    assert gpu == 2 * 5e8 and cpu == 2 * a_job().num_parameters


def test_the_worst_moment_counts() -> None:
    found = [Part(name="a", place="device", passes=3, step=1), Part(name="b", place="device", step=4)]
    found.append(Part(name="c", place="host", reduction=7))
    assert (most(found, "device"), most(found, "host"), most(found, "device", "host")) == (5, 7, 7)
    assert MOMENTS == ("passes", "reduction", "step")


def test_the_largest_preset_under_the_mechanics_of_the_repository() -> None:
    run = load(ROOT / "train" / "configs" / "1b.yaml")
    job = Job(run=run, zero=Zero(stage=3), nodes=8, slots=8, num_rows=0, on_cuda=True)
    found = by_name(job)
    states = sum(found[name].step for name in ("working weights", "gradients", "master weights", "moments of Adam"))
    assert states / 2**30 == pytest.approx(0.27, abs=0.01)
    assert job.accumulation == 2 and model_config(run).hidden_size == 1792
