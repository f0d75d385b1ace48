"""Where ingest's tasks run: processes of our own, jobs of a batch system, pods, or somebody's Dask scheduler.

In: a cluster file, or the address of a scheduler. Out: a client; one line that says why, where nobody is left to work.
"""

import contextlib
import importlib
import logging
import multiprocessing
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
from distributed import Client, LocalCluster
from distributed.core import Status
from distributed.utils import silence_logging_cmgr

from prep.cluster_config import BATCH, ClusterConfig
from prep.disk import StoreError
from prep.flow import MAX_DEATHS
from prep.plan import PrepError
from prep.settings import ConfigError
from prep.worker_jobs import Workforce, remembering

CONNECT_S = 20
LOOK_S = 0.25  # how often the watch looks
WAKE = signal.SIGUSR1  # not SIGINT, which whatever a script runs in the background has ignored
WAITING_S = 30.0  # how often it says that there is no worker
CLOSE_S = 30.0
GONE_S = 120.0  # without a worker, where they are processes of this machine that are started again at once
QUIET = {"distributed": "critical", "distributed.nanny": "critical", "distributed.worker": "critical"}
# Dask has malloc hand back every 64 KiB: a shard of 32 MiB is then paid for in page faults again and again.
MALLOC = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
KEPT_BYTES = 2**30
JOB_CLUSTERS = {"slurm": "SLURMCluster", "pbs": "PBSCluster", "lsf": "LSFCluster"}  # of dask_jobqueue
INSTALL = {
    "dask_jobqueue": "Install it: .venv/bin/pip install -c constraints.txt dask-jobqueue",
    "dask_kubernetes": "Install it, and its operator in the cluster: .venv/bin/pip install dask-kubernetes; "
    "helm install --repo https://helm.dask.org --generate-name dask-kubernetes-operator",
}


@contextlib.contextmanager
def connect(scheduler: str | None, workers: int, config: ClusterConfig | None = None) -> Iterator[Client]:
    """A client of `scheduler`, or of what `config` describes, or of `workers` processes that die with this one.

    PrepError in place of whatever the block raises, where the scheduler is lost or no worker can be had.
    """
    settings: dict[str, Any] = {"logging": QUIET, "distributed.admin.tick.limit": "60s"}
    settings["distributed.worker.profile.enabled"] = False  # looks at every thread a hundred times a second
    settings |= {f"distributed.nanny.pre-spawn-environ.{name}": KEPT_BYTES for name in MALLOC}
    settings["distributed.scheduler.allowed-failures"] = 0  # `Flow` counts the deaths, and knows better who is to blame
    settings[MAX_DEATHS] = 3 if config is None else 1 + config.allowed_failures
    settings["distributed.scheduler.work-stealing"] = False  # `Flow` says which worker does what
    if config is None or config.kind == "local":
        # Dask looks 15 s after a death, and closes for good whoever is just then starting once more.
        settings["distributed.deploy.lost-worker-timeout"] = "1 day"
    with dask.config.set(settings), contextlib.ExitStack() as stack:
        stack.enter_context(silence_logging_cmgr(logging.CRITICAL, root="distributed.client"))  # the watch speaks
        if scheduler is not None:
            client = _client_of(scheduler)
            cluster = None
        else:
            cluster = _own_processes(workers) if config is None else _start(config)
            stack.callback(_close, cluster)
            client = Client(cluster)
        stack.enter_context(client)
        where = _where(client, config)
        if scheduler is not None or config is not None or sys.stderr.isatty():
            print(f"prep ingest: {where}; {_page(client)}", file=sys.stderr)
        with _Watch(client, cluster, config).over():
            yield client


def _client_of(address: str) -> Client:
    try:
        return Client(address, timeout=CONNECT_S)
    except (OSError, ValueError) as error:
        raise StoreError(
            f"no Dask scheduler answers at {address} ({error}). Check --scheduler, or leave it out."
        ) from error


def _where(client: Client, config: ClusterConfig | None) -> str:
    """Who works, with how much memory, in words."""
    address = client.scheduler.address
    if config is None:
        limits = {worker["memory_limit"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()}
        memory = f" of at most {max(limits) / 1e9:.1f} GB" if limits else ""
        return f"scheduler {address}, {len(client.nthreads())} workers{memory}"
    least, most = config.bounds
    number = f"{most}" if least == most else f"{least} to {most}"
    return f"scheduler {address} ({config.kind}), {number} workers of one thread and at most {config.memory} each"


def _page(client: Client) -> str:
    """Where to look at the scheduler: charts where bokeh is installed, else plain tables."""
    try:
        importlib.import_module("bokeh")
    except ImportError:  # no charts
        return f"dashboard {client.dashboard_link.removesuffix('/status')}/info/main/workers.html"
    return f"dashboard {client.dashboard_link}"


# ---------------------------------------------------------------- clusters


def _own_processes(workers: int, **more: Any) -> Any:
    try:
        return LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            dashboard_address="127.0.0.1:0",  # None is port 8787, which another ingest may hold
            silence_logs=logging.CRITICAL,
            **more,
        )
    except RuntimeError as error:  # of Dask, when one of them dies in its first moments
        raise PrepError(
            f"the worker processes do not start ({error}). Is there memory left on this machine? "
            "What is sealed stays. Run the same command again to go on."
        ) from error


def _close(cluster: Any) -> None:
    """Close a cluster; Dask waits for ever for a worker that dies just then, and is being started again."""
    workers = list(cluster.workers.values())
    try:
        cluster.close(timeout=CLOSE_S)
    except TimeoutError:
        for worker in workers:
            worker.status = Status.closing  # else it starts another process
        for process in multiprocessing.active_children():
            process.kill()
        cluster.status = Status.closed  # else Dask waits once more when Python ends


def _start(config: ClusterConfig) -> Any:
    """The cluster that a file describes, with nobody in it yet unless it is of this machine."""
    least, most = config.bounds
    if config.kind == "kubernetes":
        cluster = _pods(config)
        if least != most:
            cluster.adapt(minimum=least, maximum=most)
        return cluster
    if config.kind == "local":
        cluster = _own_processes(
            max(1, least), memory_limit=config.memory_bytes, local_directory=config.local_directory
        )
    else:
        cluster = job_cluster(config)
    cluster.adapt(
        Adaptive=Workforce, kind=config.kind, workers_per_job=config.workers_per_job, minimum=least, maximum=most
    )
    return cluster


def job_cluster(config: ClusterConfig) -> Any:
    """A scheduler in this process, whose workers will be jobs of a batch system: dask-jobqueue's."""
    kind = getattr(_imported("dask_jobqueue", config.kind), JOB_CLUSTERS[config.kind])
    stays = [f"--lifetime {config.lifetime_s}s", f"--lifetime-stagger {config.stagger_s}s"]
    try:
        return kind(
            job_cls=remembering(kind.job_cls),
            cores=config.workers_per_job,
            processes=config.workers_per_job,
            memory=f"{config.workers_per_job * config.memory_bytes}B",
            job_name="brainloom-prep",
            queue=config.queue,
            interface=config.interface,
            local_directory=config.local_directory,
            log_directory=str(Path(config.log_directory).resolve()),  # PBS starts jobs in the home folder
            worker_extra_args=stays,
            job_extra_directives=list(config.directives),
            scheduler_options={"dashboard_address": ":0"},
            silence_logs=logging.CRITICAL,
            **_of_its_own(config),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"the {config.kind} cluster does not start: {error}. Check interface: and the rest."
        ) from error


def _of_its_own(config: ClusterConfig) -> dict[str, Any]:
    """Memory, account and walltime, which every batch system spells in its own way."""
    hours, minutes, seconds = config.walltime_s // 3600, config.walltime_s // 60 % 60, config.walltime_s % 60
    walltime = f"{hours:02}:{minutes:02}:{seconds:02}"
    megabytes = -(-config.job_bytes // 2**20)
    if config.kind == "slurm":
        return {"account": config.account, "walltime": walltime, "job_mem": f"{megabytes}M"}
    if config.kind == "pbs":
        asked = f"select=1:ncpus={config.workers_per_job}:mem={megabytes}mb"
        return {"account": config.account, "walltime": walltime, "resource_spec": asked}
    return {"project": config.account, "walltime": f"{hours:02}:{minutes:02}", "mem": config.job_bytes}


def job_script(config: ClusterConfig) -> str:
    """The script that each job of this cluster would be."""
    if config.kind not in BATCH:
        return f"kind {config.kind} has no job script."
    with job_cluster(config) as cluster:
        return str(cluster.job_script()).strip()


def _pods(config: ClusterConfig) -> Any:
    """Scheduler and workers as pods, by the operator of dask-kubernetes."""
    kubernetes = _imported("dask_kubernetes.operator", config.kind)
    return kubernetes.KubeCluster(custom_cluster_spec=_pod_spec(kubernetes, config), namespace=config.namespace)


def _pod_spec(kubernetes: Any, config: ClusterConfig) -> dict[str, Any]:
    """What the operator is asked for: one thread per pod, its memory limited, the store mounted."""
    spec: dict[str, Any] = kubernetes.make_cluster_spec(
        name=f"brainloom-prep-{uuid.uuid4().hex[:8]}",
        image=config.image,
        n_workers=max(1, config.bounds[0]),
        resources={
            "requests": {"cpu": "1", "memory": str(config.job_bytes)},
            "limits": {"memory": str(config.job_bytes)},
        },
        env={"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": str(config.allowed_failures)},
        worker_command=f"dask-worker --nthreads 1 --memory-limit {config.memory_bytes}B",
    )
    pod = spec["spec"]["worker"]["spec"]
    names = {claim: f"claim-{number}" for number, claim in enumerate(config.claims)}
    pod["volumes"] = [{"name": names[claim], "persistentVolumeClaim": {"claimName": claim}} for claim in config.claims]
    pod["containers"][0]["volumeMounts"] = [
        {"name": names[claim], "mountPath": path} for claim, path in config.claims.items()
    ]
    return spec


def _imported(module: str, kind: str) -> Any:
    """A library that only some clusters need; ConfigError says how to install it."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.split(".")[0]
        raise ConfigError(
            f"kind = {kind!r} needs {name}, which is not importable ({error}). {INSTALL[name]}"
        ) from error
    finally:  # dask-jobqueue makes Ctrl-C leave with exit code 0 and not a word
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- the watch


class _Watch:
    """Ends the run where its scheduler is gone or no worker can be had, since Dask itself would wait for ever."""

    def __init__(self, client: Client, cluster: Any, config: ClusterConfig | None) -> None:
        self.client, self.cluster, self.config = client, cluster, config
        self.address = client.scheduler.address
        self.main = threading.main_thread().ident or 0
        self.problem = ""
        self.end = threading.Event()
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def over(self) -> Iterator[None]:
        """Watch over a block, which the main thread runs."""
        before = signal.signal(WAKE, signal.default_int_handler)
        thread = threading.Thread(target=self._look, name="watch", daemon=True)
        thread.start()
        try:
            try:
                yield
            finally:
                with self.lock:
                    self.end.set()
                thread.join()
                signal.signal(WAKE, before)
                self.problem = self.problem or self._lost()
        except (Exception, KeyboardInterrupt) as error:  # futures of a lost scheduler end in errors of many kinds
            if self.problem:
                raise PrepError(self.problem) from error
            raise
        if self.problem:
            raise PrepError(self.problem)

    def _look(self) -> None:
        since = time.monotonic()
        said = since
        while not self.end.wait(LOOK_S):
            problem = self._lost() or self._without_jobs() or self._without_processes(time.monotonic() - since)
            with self.lock:
                if problem and not self.end.is_set():
                    self.problem = problem
                    signal.pthread_kill(self.main, WAKE)  # wakes it from whatever it waits for
                    return
            now = time.monotonic()
            if self.client.scheduler_info(n_workers=-1)["workers"]:
                since = said = now
            elif now - said >= WAITING_S:
                said = now
                print(f"prep ingest: no worker for {now - since:.0f} s{self._asked()}", file=sys.stderr)

    def _lost(self) -> str:
        if self.client.status == "running":
            return ""
        return (
            f"the connection to the Dask scheduler at {self.address} is lost: it ended, or cannot be reached. "
            "What is sealed stays. Start it again, and run the same command to go on."
        )

    def _without_jobs(self) -> str:
        problem = getattr(getattr(self.cluster, "_adaptive", None), "problem", "")
        if self.config is None or not problem:
            return ""
        return (
            f"no worker to be had: {problem}. Check the cluster file ({self.config.kind}) and what --dry-run prints, "
            f"and see what jobs print, in {self.config.log_directory}. They are to reach {self.address} from their "
            "nodes (interface). What is sealed stays."
        )

    def _without_processes(self, seconds: float) -> str:
        if seconds < GONE_S or not isinstance(self.cluster, LocalCluster):
            return ""
        return (
            f"no worker for {seconds:.0f} s: the worker processes end, and cannot be started again. Is there memory "
            "left on this machine? What is sealed stays. Run the same command again to go on."
        )

    def _asked(self) -> str:
        num_jobs = len(getattr(self.cluster, "workers", ()))
        return f"; {num_jobs} jobs asked for" if num_jobs else ""
