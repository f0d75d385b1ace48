"""What a cluster file says: which batch system, how many workers, how much memory and time each of them gets.

In: YAML (clusters/*.yaml are templates). Out: ClusterConfig, checked, or an error that names the key and the remedy.
"""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from prep.settings import ConfigError, build, read_yaml

Kind = Literal["local", "slurm", "pbs", "lsf", "kubernetes"]
BATCH: tuple[Kind, ...] = ("slurm", "pbs", "lsf")
# Keys that mean something to some kinds alone: a key without effect is a mistake that nobody would notice.
ONLY_FOR: dict[str, tuple[Kind, ...]] = {
    "walltime": BATCH,
    "lifetime": BATCH,
    "queue": BATCH,
    "account": BATCH,
    "directives": BATCH,
    "workers_per_job": BATCH,
    "interface": BATCH,
    "log_directory": BATCH,
    "local_directory": ("local", *BATCH),
    "allowed_failures": ("local", *BATCH, "kubernetes"),
    "image": ("kubernetes",),
    "namespace": ("kubernetes",),
    "claims": ("kubernetes",),
}
UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
LEAST_MEMORY = 500 * 10**6  # Python, what reads NWB and one shard in flight
OVERHEAD = 256 * 2**20  # the process beside each worker that watches over it, and the batch script
LIFETIME = 0.8  # of the walltime, where the file does not say


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """As many workers as there is work for, between these."""

    maximum: int
    minimum: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.minimum <= self.maximum or self.maximum < 1:
            raise ConfigError(
                f"minimum = {self.minimum}, maximum = {self.maximum}; expected 0 <= minimum <= maximum, maximum >= 1."
            )


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """One cluster file. A worker is one process with one thread; it is restarted where it exceeds its memory."""

    kind: Kind
    memory: str  # of each worker, e.g. 2GB
    workers: int | None = None  # either that many always,
    adaptive: Bounds | None = None  # or as many as there is work for
    walltime: str | None = None  # HH:MM:SS, after which the batch system kills a job
    lifetime: str | None = None  # HH:MM:SS, after which a worker leaves by itself; else 80 % of the walltime
    queue: str | None = None
    account: str | None = None
    directives: tuple[str, ...] = ()  # more lines of the job script's head, e.g. "--qos=long"
    workers_per_job: int = 1  # more where a job gets a whole node
    interface: str | None = None  # the network that scheduler and workers share, e.g. ib0
    local_directory: str | None = None  # scratch of a worker, on the node's own disk
    log_directory: str = "runs/prep-jobs"  # what jobs print
    allowed_failures: int = 3  # how many workers may die of a task before it is given up
    image: str | None = None  # a container image that has Brainloom installed
    namespace: str = "default"
    claims: dict[str, str] = field(default_factory=dict)  # persistent volume claim: where it is mounted

    def __post_init__(self) -> None:
        self._check_keys()
        if (self.workers is None) == (self.adaptive is None):
            raise ConfigError("workers or adaptive: give one of them (adaptive is {minimum: 0, maximum: 20}).")
        for name in ("workers", "workers_per_job", "allowed_failures"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value}; expected at least 1.")
        if any(bound % self.workers_per_job for bound in self.bounds):
            raise ConfigError(
                f"workers_per_job = {self.workers_per_job} does not divide the number of workers, {self.bounds}. "
                "Batch systems give whole jobs: choose multiples."
            )
        if self.memory_bytes < LEAST_MEMORY:
            raise ConfigError(f"memory = {self.memory!r} is too little for a worker; expected at least 500MB.")
        if self.kind in BATCH and not 0 < self.lifetime_s < self.walltime_s:
            raise ConfigError(
                f"lifetime = {self.lifetime!r} is not below walltime = {self.walltime!r}. "
                "A worker has to leave before it is killed; leave lifetime out for 80 % of the walltime."
            )

    def _check_keys(self) -> None:
        for key in fields(self):
            kinds = ONLY_FOR.get(key.name, (self.kind,))
            is_default = getattr(self, key.name) in (key.default, {})
            if self.kind not in kinds and not is_default:
                raise ConfigError(f"{key.name} is for kind {', '.join(kinds)}; kind is {self.kind}. Remove it.")
        needed = "walltime" if self.kind in BATCH else "image" if self.kind == "kubernetes" else "kind"
        if getattr(self, needed) is None:
            raise ConfigError(f"{needed} is missing, which kind {self.kind} needs. Add it.")

    @property
    def bounds(self) -> tuple[int, int]:
        """The least and the largest number of workers."""
        if self.adaptive is not None:
            return self.adaptive.minimum, self.adaptive.maximum
        assert self.workers is not None
        return self.workers, self.workers

    @property
    def memory_bytes(self) -> int:
        """The limit of one worker."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MB|GB|MiB|GiB)", self.memory)
        if match is None:
            raise ConfigError(f"memory = {self.memory!r}; expected a number and a unit, such as 2GB or 1500MiB.")
        return int(float(match.group(1)) * UNITS[match.group(2)])

    @property
    def job_bytes(self) -> int:
        """What one job asks for: its workers must reach their own limit before the batch system's."""
        return self.workers_per_job * (self.memory_bytes + OVERHEAD)

    @property
    def walltime_s(self) -> int:
        """Seconds a job may run."""
        return _seconds("walltime", self.walltime or "")

    @property
    def lifetime_s(self) -> int:
        """Seconds after which a worker leaves, about."""
        return int(LIFETIME * self.walltime_s) if self.lifetime is None else _seconds("lifetime", self.lifetime)

    @property
    def stagger_s(self) -> int:
        """How much sooner or later than `lifetime_s`: half of what is left, so that jobs do not all leave at once."""
        return min(self.lifetime_s, self.walltime_s - self.lifetime_s) // 2


def _seconds(key: str, text: str) -> int:
    match = re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d)", text)
    if match is None:
        raise ConfigError(f"{key} = {text!r}; expected HH:MM:SS, such as 04:00:00.")
    hours, minutes, seconds = map(int, match.groups())
    return 3600 * hours + 60 * minutes + seconds


def load(path: Path) -> ClusterConfig:
    """The cluster file at `path`; ConfigError where a key is unknown, missing, wrong or without effect."""
    content: dict[str, Any] = read_yaml(path)
    return build(ClusterConfig, content, str(path))
