"""What the ranks of a run send each other in a step, and how long a step takes.

In: a job, what the machine can do. Out: bytes of each exchange within a node and between nodes, seconds of a step
between two bounds: everything sent while something is computed, and nothing.

Collectives are rings through all ranks, node by node, as NCCL makes them (Thakur, Rabenseifner & Gropp 2005): of a
payload V each of N ranks sends V (N - 1) / N in N - 1 messages, one after the other, to gather or to scatter, and twice
that to reduce for all; what leaves a node leaves it once, shared among its GPUs' network cards. A message of n bytes
takes alpha + n / beta (Hockney 1994), a latency and the bytes over a bandwidth: one pair of numbers within a node, and
one between nodes, which `make doctor` measures.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from prep.settings import ConfigError
from train.activations import Passes
from train.memory import FP32, INT64, NUM_MOMENTS, Job
from train.muon import rounds
from train.usage import PEAKS

Group = Literal["all", "node", "pairs", "host", "disk"]
GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What is assumed of one GPU and its share of the node; the defaults are of an H100 SXM in a DGX H100.

    Data sheets: NVIDIA H100 (80 GB; 989 TFLOP/s dense bf16; NVLink 4, 450 GB/s each way; PCIe 5, 64 GB/s each way); DGX
    H100 (2 TB of memory, eight cards of 400 Gb/s = 50 GB/s, eight NVMe disks). Links reach 80 % of their sheet.
    Latencies: what NCCL assumes of a hop of a ring (src/graph/tuning.cc, protocol LL128: NVLink, network).
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
    latency_intra: float = 1.9  # microseconds of a message to another GPU of the node
    latency_inter: float = 4.0  # microseconds of a message to another node
    bandwidth_host: float = 50.0  # GB/s of a GPU to the host
    bandwidth_disk: float = 3.0  # GB/s of a GPU's share of the NVMe disks

    def __post_init__(self) -> None:
        may_be_zero = ("reserved_gib", "slack", "process_gib", "latency_intra", "latency_inter")
        for name, value in asdict(self).items():
            if value < 0 or (value == 0 and name not in may_be_zero):
                raise ConfigError(f"{name} = {value} must be more than 0.")


FP32_TFLOPS = 67.0  # of an H100, without TF32


def laptop(memory_gib: float) -> Machine:
    """Of one process on a CPU core; `memory_gib` is the whole machine's."""
    return Machine(
        memory_gib=memory_gib,
        reserved_gib=0.5,
        slack=0.24,  # freed blocks that the C library keeps: 0.12 to 0.37 of what is counted were measured
        host_memory_gib=memory_gib,
        process_gib=0.5,
        peak_tflops=0.1,
        mfu=0.3,
        bandwidth_intra=2.0,
        bandwidth_inter=1.0,
        latency_intra=100.0,
        latency_inter=200.0,
        bandwidth_host=10.0,
        bandwidth_disk=1.0,
    )


@dataclass(frozen=True)
class Exchange:
    """`payload` bytes, `times` a step. Within `all` ranks or a `node`, or between all pairs, or with host or disk.

    `rounds` is how often a step goes around the ring, or to all others.
    """

    name: str
    payload: float
    times: float
    group: Group
    rounds: float = 0

    def sent(self, nodes: int, slots: int) -> tuple[float, float]:
        """Bytes that a GPU sends in a step: to others of its node, and its share of what leaves the node."""
        total, ranks = self.payload * self.times, nodes * slots
        if self.group == "node":
            return total * (slots - 1) / slots, 0.0
        if self.group == "pairs":
            return total * (slots - 1) / ranks, total * (ranks - slots) / ranks
        around = total * (ranks - 1) / ranks
        return (around, 0.0) if nodes == 1 else (around * (slots - 1) / slots, around / slots)

    def hops(self, nodes: int, slots: int) -> tuple[int, int]:
        """Messages of a round that wait for each other: within nodes, and between them."""
        if self.group == "pairs":
            return (0, 1) if nodes > 1 else (1, 0)  # all at the same time
        if self.group == "node" or nodes == 1:
            return slots - 1, 0
        return nodes * (slots - 1), nodes - 1

    def waiting(self, job: Job, machine: Machine) -> float:
        """Seconds of the latency of its messages."""
        intra, inter = self.hops(job.nodes, job.slots)
        return self.rounds * (intra * machine.latency_intra + inter * machine.latency_inter) / 1e6

    def seconds(self, job: Job, machine: Machine) -> float:
        """How long it takes when nothing else is sent."""
        if self.group in ("host", "disk"):
            bandwidth = machine.bandwidth_host if self.group == "host" else machine.bandwidth_disk
            return self.payload * self.times / bandwidth / GB
        intra, inter = self.sent(job.nodes, job.slots)
        sending = max(intra / machine.bandwidth_intra, inter / machine.bandwidth_inter) / GB
        return self.waiting(job, machine) + sending


def exchanges(job: Job, passes: Passes) -> list[Exchange]:
    """All that is sent in a step; nothing where a rank is alone."""
    made = [*_of_the_core(job), *_of_the_table(job, passes), _sums(job)] if job.num_ranks > 1 else []
    return [exchange for exchange in (*made, *_with_the_host(job)) if exchange.payload * exchange.times]


def _sums(job: Job) -> Exchange:
    """The norm of each group's gradient and of the table's, and a step's row of metrics."""
    return Exchange("sums of single numbers", 116 + 8 * num_groups(job), 2, "all", rounds=2 * (2 + num_groups(job)))


def num_groups(job: Job) -> int:
    """Parameters come in groups that are stepped, and below ZeRO-3 gathered, one after the other."""
    return 2 + bool(job.matrices)  # what decays, what does not, and what Muon moves


def _of_the_core(job: Job) -> Iterator[Exchange]:
    zero, size, passes = job.zero, job.weight_bytes, job.accumulation
    whole = size * job.num_parameters
    buckets = num_buckets(job.sizes_as_reduced, zero.reduce_bucket_size)
    cut = sorted(job.cut_matrices)
    calls = sum(len(cut[together][: job.num_ranks]) for together in rounds(cut, job.num_ranks))  # of one sub-group
    for name in ("pieces of matrices, each to one rank", "directions of matrices, from one rank"):
        yield Exchange(name, FP32 * sum(cut), 1, "all", calls)
    if zero.stage < 3:
        times = 2 * (passes if zero.stage == 2 else 1)
        yield Exchange("gradients, reduced for all", whole, times, "all", times * buckets)
        yield Exchange("weights, gathered after the step", whole, min(1, zero.stage), "all", num_groups(job))
        return
    persistent, rest = size * job.persistent, size * (job.num_parameters - job.persistent)
    again = rest - size * job.gathered
    small = zero.stage3_param_persistence_threshold
    number = sum(numel <= small for numel in job.sizes)  # each is gathered alone
    yield Exchange("weights, gathered after the step", persistent, 1, "all", number)
    # Modules are gathered ahead, in buckets; where few may be alive, in more and smaller ones than are counted here.
    partitioned = [numel for numel in job.sizes if numel > small]
    fetched = num_buckets(partitioned, zero.stage3_prefetch_bucket_size, over=True)
    refetched = math.ceil(fetched * again / rest) if rest else 0
    if zero.zero_hpz_partition_size > 1:  # pieces of the second partition are new after each step
        yield Exchange("weights, gathered for the first forward pass", rest, 1, "all", fetched)
        others = passes - 1
        yield Exchange("weights, gathered for other forward passes", rest, others, "node", others * fetched)
        yield Exchange("weights, gathered for backward passes", again, passes, "node", passes * refetched)
    else:
        yield Exchange("weights, gathered for forward passes", rest, passes, "all", passes * fetched)
        yield Exchange("weights, gathered for backward passes", again, passes, "all", passes * refetched)
    times = passes if job.on_cuda else 2 * passes  # Gloo reduces for all, and keeps a piece
    yield Exchange("gradients, scattered", whole, times, "all", times * buckets)


def num_buckets(sizes: Iterable[int], most: float, over: bool = False) -> int:
    """Into how many buckets of `most` elements parameters go, in their order; `over`: the last of each may go over."""
    number, filled = 0, math.inf
    for size in sizes:
        if filled >= most if over else filled + size > most:
            number, filled = number + 1, 0.0
        filled += size
    return number


def _of_the_table(job: Job, passes: Passes) -> Iterator[Exchange]:
    """Numbers of rows, their values, their gradients; as if no two windows had a source in common.

    A rank has each row once a step; beside the three, one exchange says how many rows come.
    """
    row = 2 * FP32 * job.config.unit_embed_size + INT64
    rows = min(passes.rows * job.accumulation, job.num_rows)
    yield Exchange("rows of the unit table, and back", rows * row, 1, "pairs", rounds=4)


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
