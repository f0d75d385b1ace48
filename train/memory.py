"""The memory of a run, part by part: on a GPU, on its host, on disks; under any of DeepSpeed's mechanics.

In: a job, which is a run on a number of nodes under a ds_config. Out: parts, each with its bytes at three moments.

What DeepSpeed keeps is read off its source (runtime/zero/stage3.py, stage_1_and_2.py of 0.19), and every term is one of
`parts`; tests/test_train_dry_run_peak.py holds their sum against the peak of real runs. In no term is what the C
library keeps of freed blocks on a CPU (the slack of `traffic.laptop`), and what a CPU's bf16 kernels take inside.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any, Literal

import torch

from train.activations import DTYPES, Passes
from train.build import model_config
from train.config import RunConfig, gradient_accumulation
from train.loader import READ_AHEAD
from train.model.configuration_brainloom import BrainloomConfig
from train.model.modeling_brainloom import BrainloomForPreTraining
from train.muon import is_matrix, rounds

Place = Literal["device", "host", "disk"]
BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
FP32, INT64 = 4, 8
NUM_MOMENTS = 2  # of Adam
SWAP_BUFFERS = 4  # of a sub-group's size: DeepSpeed's `buffer_count`
PLACES: dict[str, Place] = {"none": "device", "cpu": "host", "nvme": "disk"}
HANDS = 2  # batches of the reader beside its queue: the one that it puts in, and the one that it makes


@dataclass(frozen=True, kw_only=True)
class Zero:
    """Keys of `zero_optimization` that cost memory or traffic, with DeepSpeed's defaults; sizes are in elements."""

    stage: int = 0
    overlap_comm: bool | None = None
    reduce_bucket_size: float = 5e8
    stage3_prefetch_bucket_size: float = 5e7
    stage3_max_live_parameters: float = 1e9
    stage3_max_reuse_distance: float = 1e9
    stage3_param_persistence_threshold: float = 1e5
    sub_group_size: float = 1e9
    zero_hpz_partition_size: int = 1
    offload_optimizer: str = "none"
    offload_param: str = "none"

    @classmethod
    def of(cls, mechanics: dict[str, Any]) -> "Zero":
        """Of a whole ds_config; keys that cost nothing are passed over."""
        section = dict(mechanics["zero_optimization"])
        for name in ("offload_optimizer", "offload_param"):
            if name in section:
                section[name] = section[name]["device"]
        return cls(**{name: value for name, value in section.items() if name in cls.__dataclass_fields__})

    @property
    def overlaps(self) -> bool:
        """Are gradients reduced while others are computed? By default under ZeRO-3 alone."""
        return self.stage == 3 if self.overlap_comm is None else self.overlap_comm


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run on `nodes` x `slots` ranks; `num_rows` of the unit table, over all ranks."""

    run: RunConfig
    zero: Zero
    nodes: int
    slots: int
    num_rows: int
    on_cuda: bool

    @property
    def num_ranks(self) -> int:
        """One for each GPU, or CPU process."""
        return self.nodes * self.slots

    @property
    def accumulation(self) -> int:
        """Micro-batches of a rank in a step."""
        return gradient_accumulation(self.run.train, self.num_ranks)

    @property
    def weight_bytes(self) -> int:
        """Of a working weight, of a gradient, of what is sent of both."""
        return BYTES[self.run.train.precision]

    @cached_property
    def config(self) -> BrainloomConfig:
        """The model's."""
        return model_config(self.run)

    @cached_property
    def core(self) -> BrainloomForPreTraining:
        """The model's shapes; nothing else of it is built."""
        with torch.device("meta"):
            return BrainloomForPreTraining(self.config)

    @cached_property
    def sizes(self) -> list[int]:
        """Elements of each parameter of the core."""
        return [parameter.numel() for parameter in self.core.parameters()]

    @cached_property
    def matrices(self) -> list[int]:
        """Elements of each parameter that Muon moves, where it does."""
        named = self.core.named_parameters() if self.run.train.optimizer == "muon" else ()
        return [parameter.numel() for name, parameter in named if is_matrix(name, parameter.shape)]

    @cached_property
    def cut_matrices(self) -> list[int]:
        """Those of which several ranks keep a piece: ZeRO-3 cuts each of them, the others all as one, after padding."""
        if self.zero.stage == 3 or self.num_ranks == 1:
            return self.matrices * (self.num_ranks > 1)
        if self.zero.stage == 0:
            return []
        aligned = 2 * self.num_ranks
        length = math.ceil(sum(self.matrices) / aligned) * aligned // self.num_ranks
        stops = list(accumulate(self.matrices))
        return [n for n, stop in zip(self.matrices, stops, strict=True) if (stop - n) // length != (stop - 1) // length]

    @property
    def sizes_as_reduced(self) -> list[int]:
        """The same, as gradients come: the last first, and under ZeRO-3 all of a block at its end, in their order."""
        if self.zero.stage < 3:
            return self.sizes[::-1]
        blocks = [module for module in self.core.modules() if type(module).__name__ in self.core._no_split_modules]
        block_of = {id(parameter): block for block in blocks for parameter in block.parameters()}
        groups = groupby(self.core.parameters(), lambda parameter: id(block_of.get(id(parameter), parameter)))
        return [parameter.numel() for group in [list(group) for _, group in groups][::-1] for parameter in group]

    @cached_property
    def num_parameters(self) -> int:
        """P_core."""
        return sum(self.sizes)

    @cached_property
    def own(self) -> int:
        """Elements of the core whose states this rank keeps: each parameter is padded and cut into equal pieces."""
        return sum(math.ceil(size / self.num_ranks) for size in self.sizes) if self.zero.stage else self.num_parameters

    @cached_property
    def persistent(self) -> int:
        """Elements that stay whole on every rank under ZeRO-3."""
        return sum(size for size in self.sizes if size <= self.zero.stage3_param_persistence_threshold)

    @property
    def gathered(self) -> int:
        """Elements that are whole at the turn from forward to backward, beside those that always are.

        What is needed again within the reuse distance is not released; and prefetching goes ahead with each module,
        however small, until so many are alive.
        """
        zero = self.zero
        most = max(zero.stage3_max_reuse_distance / 2, zero.stage3_max_live_parameters)
        return int(min(self.num_parameters - self.persistent, most))

    @property
    def num_copies(self) -> int:
        """Of each weight and row that a checkpoint has: itself, its moments, its average."""
        return 1 + NUM_MOMENTS + (self.run.train.average_steps > 0)

    @property
    def optimizer_place(self) -> Place:
        """Where the optimizer computes."""
        return "device" if self.zero.offload_optimizer == "none" else "host"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Bytes of one rank, at each of MOMENTS."""

    name: str
    place: Place
    passes: float = 0  # when most activations are alive
    reduction: float = 0  # at the end of the backward pass, when the last gradients are sent
    step: float = 0  # of the optimizer


MOMENTS = ("passes", "reduction", "step")


def parts(job: Job, passes: Passes) -> list[Part]:
    """Everything that a rank holds; `passes` are of its largest micro-batch."""
    made = (*_states(job), *_gathered(job), *_gradients(job), *_optimizer(job), *_unit_table(job, passes))
    made = (*made, *_activations(passes), *_batches(job, passes))
    return [part for part in made if any(getattr(part, moment) for moment in MOMENTS)]


def most(made: list[Part], *places: Place) -> float:
    """Bytes at the worst moment, in these places together."""
    here = [part for part in made if part.place in places]
    return max(float(sum(getattr(part, moment) for part in here)) for moment in MOMENTS)


def _always(name: str, place: Place, size: float) -> Part:
    return Part(name=name, place=place, passes=size, reduction=size, step=size)


def _states(job: Job) -> Iterator[Part]:
    """What stays from step to step."""
    zero, own = job.zero, job.own
    place = PLACES[zero.offload_optimizer]
    weights = job.weight_bytes * (own if zero.stage == 3 else job.num_parameters)
    yield _always("working weights", PLACES[zero.offload_param], weights)
    yield _always("master weights", place, FP32 * own)
    yield _always("moments of Adam", place, FP32 * NUM_MOMENTS * own)
    yield _always("average of the weights", job.optimizer_place, FP32 * own * (job.run.train.average_steps > 0))


def _gathered(job: Job) -> Iterator[Part]:
    """Parameters that are whole for a while under ZeRO-3; one rank alone looks at its own, and copies nothing."""
    zero, size = job.zero, job.weight_bytes
    if zero.stage < 3 or job.num_ranks == 1:
        return
    yield _always("parameters always whole", "device", size * job.persistent)
    yield Part(name="parameters gathered", place="device", passes=size * job.gathered)
    # What comes in is one buffer, from which each parameter is copied; it goes with the last of them.
    ahead = min(job.num_parameters - job.persistent, zero.stage3_prefetch_bucket_size)
    yield Part(name="buffer they come in by", place="device", passes=size * ahead)
    if zero.zero_hpz_partition_size > 1:
        second = size * sum(math.ceil(numel / zero.zero_hpz_partition_size) for numel in job.sizes)
        yield Part(name="second partition, of the node", place="device", passes=second, reduction=second)


def _gradients(job: Job) -> Iterator[Part]:
    """Gradients wait for the step, whole or in pieces; on their way they are collected in buckets."""
    zero, size, own = job.zero, job.weight_bytes, job.weight_bytes * job.own
    kept = own if zero.stage >= 2 else size * job.num_parameters
    filled = size * min(job.num_parameters, zero.reduce_bucket_size)
    # Of a CPU's memory a process has what it has written to; a GPU's is taken when it is asked for.
    bucket = size * zero.reduce_bucket_size if job.on_cuda else filled
    if zero.stage == 3:
        yield _always("gradients", job.optimizer_place, own)
        yield _always("bucket of gradients", "device", bucket)
        several = filled * (job.num_parameters > zero.reduce_bucket_size)
        # Before they are sent, the pieces of each rank are put side by side.
        yield Part(name="gradients, in order of ranks", place="device", passes=several, reduction=filled)
        return
    before = kept * (job.accumulation > 1)
    yield Part(name="gradients", place=job.optimizer_place, passes=before, reduction=kept, step=own)
    bucket *= 1 + zero.overlaps
    yield Part(name="buckets of gradients", place="device", passes=bucket * job.on_cuda, reduction=bucket)


def _optimizer(job: Job) -> Iterator[Part]:
    """A step goes through sub-groups of parameters; each has its gradient once more, in fp32."""
    place, offload = job.optimizer_place, job.zero.offload_optimizer
    group = FP32 * (min(job.own, job.zero.sub_group_size) if job.zero.stage == 3 else job.own)
    if offload == "none":
        yield Part(name="gradients in fp32", place=place, step=group)
    elif offload == "cpu":
        yield _always("gradients in fp32", place, FP32 * job.own)
    else:
        yield _always("buffers of the disk", place, SWAP_BUFFERS * group)
    # The root of the second moment, and on a CPU its quotient too, where CUDA's divides in place; fused Adam has none.
    temporaries = 1 if job.on_cuda else 2
    yield Part(name="temporaries of Adam", place=place, step=temporaries * group * (offload == "none"))
    # Each rank's whole, of the one that is its own the iterate and the next one; the squares are smaller.
    cut = sorted(job.cut_matrices)
    dealt = max((sum(cut[together]) for together in rounds(cut, job.num_ranks)), default=0)
    orthogonal = dealt + 3 * max(job.matrices, default=0)
    yield Part(name="matrices, made orthogonal", place=place, step=FP32 * orthogonal)


def _activations(passes: Passes) -> Iterator[Part]:
    yield Part(name="activations kept", place="device", passes=passes.kept)
    yield Part(name="activations for a while", place="device", passes=passes.most - passes.kept)


def _unit_table(job: Job, passes: Passes) -> Iterator[Part]:
    """Rows are sharded; those of a batch come as values, and go as gradients."""
    row = FP32 * job.config.unit_embed_size
    held = math.ceil(job.num_rows / job.num_ranks) * (job.num_copies * row + INT64) + INT64 * job.num_rows
    yield _always("unit table, rows held", "device", held)
    used = passes.rows * row
    yield Part(name="unit table, rows in use", place="device", passes=2 * used, reduction=2 * used, step=used)


def _batches(job: Job, passes: Passes) -> Iterator[Part]:
    """A step has all its micro-batches; more are read ahead; checkpoints are written from a copy, which stays."""
    yield _always("batches of a step", "device", job.accumulation * passes.inputs)
    ahead = READ_AHEAD * max(1, job.run.data.num_workers) + HANDS
    yield _always("batches read ahead", "host", ahead * passes.inputs)
    yield _always("copy for checkpoints", "host", FP32 * job.num_copies * job.own)
