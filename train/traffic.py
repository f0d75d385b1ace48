"""What the ranks of a run send each other in a step, and how long a step takes.

In: a job, what the machine can do. Out: bytes of each exchange within a node and between nodes, seconds of a step
between two bounds: everything sent while something is computed, and nothing.

Collectives are rings through all ranks, node by node, as NCCL makes them: of a payload V each of N ranks sends
V (N - 1) / N to gather or to scatter, twice that to reduce for all; what leaves a node leaves it once, shared among its
GPUs' network cards.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from prep.settings import ConfigError
from train.activations import Passes
from train.memory import FP32, INT64, NUM_MOMENTS, Job
from train.usage import PEAKS

Group = Literal["all", "node", "pairs", "host", "disk"]
GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What is assumed of one GPU and its share of the node; the defaults are of an H100 SXM in a DGX H100.

    Data sheets: NVIDIA H100 (80 GB; 989 TFLOP/s dense bf16; NVLink 4, 450 GB/s each way; PCIe 5, 64 GB/s each way); DGX
    H100 (2 TB of memory, eight cards of 400 Gb/s = 50 GB/s, eight NVMe disks). Links reach 80 % of their sheet.
    """

    memory_gib: float = 79.0
    reserved_gib: float = 2.5  # the CUDA context, cuBLAS, and the buffers of NCCL's channels
    slack: float = 0.05  # of what is allocated: what the allocator cannot use, in pieces
    host_memory_gib: float = 2048.0  # of a node
    process_gib: float = 3.0  # of a rank's process in the host's memory, beside what is counted
    peak_tflops: float = PEAKS["H100"] / 1e12
    mfu: float = 0.4
    bandwidth_intra: float = 360.0  # GB/s of a GPU to the others of its node
    bandwidth_inter: float = 40.0  # GB/s of a GPU's network card
    bandwidth_host: float = 50.0  # GB/s of a GPU to the host
    bandwidth_disk: float = 3.0  # GB/s of a GPU's share of the NVMe disks

    def __post_init__(self) -> None:
        may_be_zero = ("reserved_gib", "slack", "process_gib")
        for name, value in asdict(self).items():
            if value < 0 or (value == 0 and name not in may_be_zero):
                raise ConfigError(f"{name} = {value} must be more than 0.")


FP32_TFLOPS = 67.0  # of an H100, without TF32


def laptop(memory_gib: float) -> Machine:
    """Of one process on a CPU core; `memory_gib` is the whole machine's."""
    return Machine(
        memory_gib=memory_gib,
        reserved_gib=0.5,
        slack=0.25,  # freed blocks that the C library keeps; 0.18 to 0.36 were measured
        host_memory_gib=memory_gib,
        process_gib=0.5,
        peak_tflops=0.1,
        mfu=0.3,
        bandwidth_intra=2.0,
        bandwidth_inter=1.0,
        bandwidth_host=10.0,
        bandwidth_disk=1.0,
    )


@dataclass(frozen=True)
class Exchange:
    """`payload` bytes, `times` a step. Within `all` ranks or a `node`, or between all pairs, or with host or disk."""

    name: str
    payload: float
    times: float
    group: Group

    def sent(self, nodes: int, slots: int) -> tuple[float, float]:
        """Bytes that a GPU sends in a step: to others of its node, and its share of what leaves the node."""
        total, ranks = self.payload * self.times, nodes * slots
        if self.group == "node":
            return total * (slots - 1) / slots, 0.0
        if self.group == "pairs":
            return total * (slots - 1) / ranks, total * (ranks - slots) / ranks
        around = total * (ranks - 1) / ranks
        return (around, 0.0) if nodes == 1 else (around * (slots - 1) / slots, around / slots)

    def seconds(self, job: Job, machine: Machine) -> float:
        """How long it takes when nothing else is sent."""
        if self.group in ("host", "disk"):
            bandwidth = machine.bandwidth_host if self.group == "host" else machine.bandwidth_disk
            return self.payload * self.times / bandwidth / GB
        intra, inter = self.sent(job.nodes, job.slots)
        return max(intra / machine.bandwidth_intra, inter / machine.bandwidth_inter) / GB


def exchanges(job: Job, passes: Passes) -> list[Exchange]:
    """All that is sent in a step; nothing where a rank is alone."""
    made = [*_of_the_core(job), *_of_the_table(job, passes)] if job.num_ranks > 1 else []
    return [exchange for exchange in (*made, *_with_the_host(job)) if exchange.payload * exchange.times]


def _of_the_core(job: Job) -> Iterator[Exchange]:
    zero, size, passes = job.zero, job.weight_bytes, job.accumulation
    whole = size * job.num_parameters
    if zero.stage < 3:
        yield Exchange("gradients, reduced for all", whole, 2 * (passes if zero.stage == 2 else 1), "all")
        yield Exchange("weights, gathered after the step", whole, min(1, zero.stage), "all")
        return
    persistent, rest = size * job.persistent, size * (job.num_parameters - job.persistent)
    again = rest - size * job.gathered
    yield Exchange("weights, gathered after the step", persistent, 1, "all")
    if zero.zero_hpz_partition_size > 1:  # pieces of the second partition are new after each step
        yield Exchange("weights, gathered for the first forward pass", rest, 1, "all")
        yield Exchange("weights, gathered for other forward passes", rest, passes - 1, "node")
        yield Exchange("weights, gathered for backward passes", again, passes, "node")
    else:
        yield Exchange("weights, gathered for forward passes", rest, passes, "all")
        yield Exchange("weights, gathered for backward passes", again, passes, "all")
    yield Exchange("gradients, scattered", whole, passes, "all")


def _of_the_table(job: Job, passes: Passes) -> Iterator[Exchange]:
    """Numbers of rows, their values, their gradients; as if no two windows had a source in common."""
    row = 2 * FP32 * job.config.unit_embed_size + INT64
    yield Exchange("rows of the unit table, and back", passes.rows * row, job.accumulation, "pairs")


def _with_the_host(job: Job) -> Iterator[Exchange]:
    """Offloaded states: gradients go, weights come; from the disk come the states of each sub-group, and go back."""
    if job.zero.offload_param != "none":
        yield Exchange("weights from the host", job.weight_bytes * job.own, 2 * job.accumulation, "host")
    if job.zero.offload_optimizer != "none":
        yield Exchange("gradients to the host, weights back", 2 * job.weight_bytes * job.own, 1, "host")
    if job.zero.offload_optimizer == "nvme":
        yield Exchange("states from the disk, and back", 2 * FP32 * (1 + NUM_MOMENTS) * job.own, 1, "disk")


@dataclass(frozen=True)
class Pace:
    """Seconds of a step: of operations, of exchanges, of what neither of them can hide."""

    compute_s: float
    exchange_s: float
    offload_s: float

    @property
    def bounds_s(self) -> tuple[float, float]:
        """All that is sent is hidden behind what is computed, or nothing is."""
        hidden, open_ = max(self.compute_s, self.exchange_s), self.compute_s + self.exchange_s
        return hidden + self.offload_s, open_ + self.offload_s


def pace(job: Job, machine: Machine, flops: float, sent: list[Exchange]) -> Pace:
    """Of a step of `flops` operations over all ranks."""
    compute_s = flops / (job.num_ranks * machine.peak_tflops * 1e12 * machine.mfu)
    offload = [exchange for exchange in sent if exchange.group in ("host", "disk")]
    times = [sum(x.seconds(job, machine) for x in some) for some in ([x for x in sent if x not in offload], offload)]
    return Pace(compute_s, *times)
