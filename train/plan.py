"""The plan of a run: its memory, its traffic and its days, put together; and whether it fits.

In: a job, what the machine can do, the shapes of samples, recordings. Out: Plan, and what is short, in words.
"""

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any

from prep.store import Store
from train.activations import Passes, trace
from train.build import model_config
from train.config import RunConfig
from train.flops import Shape, forward_flops, fullest_shape, parameters, training_flops
from train.loader import TrainingSamples
from train.masking import num_folds
from train.memory import MOMENTS, Job, Part, most, parts
from train.traffic import Exchange, Machine, Pace, exchanges, pace

GIB = 2**30
DAY_S = 86_400
HOURS = 1_000  # of recording, where there is no store


@dataclass(frozen=True, kw_only=True)
class Recordings:
    """What one pass goes through; `unit_hours` of the train split, 0 where it is not known."""

    name: str
    num_windows: int
    unit_hours: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run on a machine; `samples` are the shapes of one window in each turn, `passes` of the largest micro-batch."""

    job: Job
    machine: Machine
    samples: tuple[Shape, ...]
    passes: Passes
    recordings: Recordings

    @cached_property
    def parts(self) -> list[Part]:
        """Memory of a rank."""
        return parts(self.job, self.passes)

    @cached_property
    def exchanges(self) -> list[Exchange]:
        """What is sent in a step."""
        return exchanges(self.job, self.passes)

    @cached_property
    def device_gib(self) -> float:
        """The most that a rank needs on its GPU, or of a CPU's memory, with what is assumed beside what is counted."""
        places = ("device",) if self.job.on_cuda else ("device", "host")
        return most(self.parts, *places) * (1 + self.machine.slack) / GIB + self.machine.reserved_gib

    @cached_property
    def host_gib(self) -> float:
        """The most that the ranks of a node need of the host's memory."""
        if not self.job.on_cuda:
            return self.job.slots * self.device_gib
        return self.job.slots * (most(self.parts, "host") / GIB + self.machine.process_gib)

    @property
    def disk_gib(self) -> float:
        """What the ranks of a node keep on its disks while they run."""
        return self.job.slots * most(self.parts, "disk") / GIB

    @property
    def flops(self) -> float:
        """Operations of a step, over all ranks; without what activation checkpointing repeats."""
        return fmean(sum(training_flops(self.job.config, shape).values()) for shape in self._global)

    @property
    def tokens(self) -> float:
        """Visible and asked tokens of a step, at most."""
        return fmean(shape.batch * (shape.tokens + shape.queries) for shape in self._global)

    @property
    def _global(self) -> list[Shape]:
        return [replace(shape, batch=self.job.run.train.global_batch_size) for shape in self.samples]

    @cached_property
    def pace(self) -> Pace:
        """Seconds of a step; MFU is of useful operations, so that those that are repeated take their time beside."""
        again = 0.0
        if self.job.run.train.activation_checkpointing:
            again = fmean(sum(forward_flops(self.job.config, shape).values()) for shape in self._global)
        return pace(self.job, self.machine, self.flops + again, self.exchanges)

    def days(self, num_steps: float) -> tuple[float, float]:
        """Of so many steps, between the bounds."""
        low_s, high_s = self.pace.bounds_s
        return num_steps * low_s / DAY_S, num_steps * high_s / DAY_S

    @property
    def steps_of_a_pass(self) -> float:
        """Through the recordings."""
        return self.recordings.num_windows / self.job.run.train.global_batch_size

    @property
    def shortage(self) -> str:
        """What does not fit, with the parts that are largest; empty where all does."""
        machine, on_cuda = self.machine, self.job.on_cuda
        if on_cuda and self.device_gib > machine.memory_gib:
            return (
                f"a GPU needs {self.device_gib:.1f} GiB, and has {machine.memory_gib:.1f} ({self._largest('device')})"
            )
        if self.host_gib > machine.host_memory_gib:
            largest = self._largest("host") if on_cuda else self._largest("device", "host")
            return f"a node needs {self.host_gib:.1f} GiB of memory, and has {machine.host_memory_gib:.1f} ({largest})"
        return ""

    def _largest(self, *places: str) -> str:
        here = [
            (max(getattr(part, m) for m in MOMENTS) / GIB, part.name) for part in self.parts if part.place in places
        ]
        return ", ".join(f"{name} {size:.1f}" for size, name in sorted(here, reverse=True)[:4])

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        job = self.job
        sent = [exchange.sent(job.nodes, job.slots) for exchange in self.exchanges]
        return {
            "preset": job.run.model.preset,
            "nodes": job.nodes,
            "slots": job.slots,
            "ds_config": job.run.ds_config,
            "parameters": parameters(job.config),
            "unit_rows": job.num_rows,
            "unit_embed_size": job.config.unit_embed_size,
            "memory_bytes": [asdict(part) for part in self.parts],
            "device_gib": self.device_gib,
            "host_gib": self.host_gib,
            "disk_gib": self.disk_gib,
            "exchanges": [
                {**asdict(exchange), "intra_bytes": intra, "inter_bytes": inter}
                for exchange, (intra, inter) in zip(self.exchanges, sent, strict=True)
            ],
            "flops_per_step": self.flops,
            "tokens_per_step": self.tokens,
            "pace": {**asdict(self.pace), "bounds_s": self.pace.bounds_s},
            "recordings": asdict(self.recordings),
            "days": self.days(job.run.train.num_steps),
            "days_of_a_pass": self.days(self.steps_of_a_pass),
            "machine": asdict(self.machine),
            "shortage": self.shortage,
        }


def plan_of(job: Job, machine: Machine, samples: tuple[Shape, ...], recordings: Recordings) -> Plan:
    """Count the activations of the largest turn, and put everything together."""
    train = job.run.train
    counted = [
        trace(job.config, shape, train.precision, train.activation_checkpointing, job.on_cuda)
        for shape in dict.fromkeys(replace(shape, batch=train.micro_batch_size) for shape in samples)
    ]
    largest = max(counted, key=lambda passes: passes.most)
    return Plan(job=job, machine=machine, samples=samples, passes=largest, recordings=recordings)


def samples_of(run: RunConfig, store: Store | None) -> tuple[tuple[Shape, ...], Recordings]:
    """Shapes of a window in each turn, and what a pass goes through; without a store as if everything were visible."""
    if store is None:
        lengths_s = [turn.context_s for turn in run.turns]
        fullest = [replace(run, data=replace(run.data, context_s=length_s)) for length_s in lengths_s]
        windows = round(HOURS * 3600 / run.data.stride_s)
        recordings = Recordings(name=f"{HOURS:,} hours of recording", num_windows=windows)
        return tuple(fullest_shape(each, model_config(each)) for each in fullest), recordings
    samples = TrainingSamples(store.address, run, model_config(run))
    shapes = tuple(
        Shape(
            sources=size.num_sources,
            tokens=size.num_inputs,
            frames=size.num_frames,
            context_s=turn.context_s,
            folds=num_folds(turn.mix),
            queries=size.num_queries,
        )
        for turn, size in samples.budgets.items()
    )
    hours = [
        entry["num_units"] * (stop_ns - start_ns) / 3.6e12
        for entry in store.entries
        for start_ns, stop_ns, label in entry["splits"]
        if label == "train"
    ]
    return shapes, Recordings(name="the store", num_windows=samples.order.num_tickets(), unit_hours=sum(hours))
