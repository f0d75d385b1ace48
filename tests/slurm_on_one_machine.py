"""A real SLURM of a login node and two compute nodes on this one machine: namespaces, munge, slurmctld, slurmd.

In: a folder to work in. Out: a running cluster, whose commands run as on its login node; nothing of it afterwards.
Each node has a network, processes, a host name and /dev/shm of its own, and knows the names of both.
"""

import contextlib
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

NEEDS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "nsenter")
PACKAGES = "slurmctld slurmd slurm-client munge iproute2"
NODES = ("n1", "n2")
PATIENCE_S = 40.0

CONF = """
ClusterName=loom
SlurmctldHost={host}({prefix}.10)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
ReturnToService=2
KillWait=5
NodeName=n1 NodeHostname=n1 NodeAddr={prefix}.11 CPUs=2 RealMemory=6000
NodeName=n2 NodeHostname=n2 NodeAddr={prefix}.12 CPUs=2 RealMemory=6000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
# In the namespaces of a node: who this is, memory that no other node sees, names. The shell stays, as the first process
# of the node, since whoever is that has to collect what others leave: SLURM waits for it.
ENTER = """
hostname "$1" && mount -t tmpfs -o size=512m tmpfs /dev/shm && mount --bind "$2" /etc/hosts && shift 2
"$@" &
wait
"""
CGROUP_CONF = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n"


def why_not() -> str:
    """What this machine lacks for it; empty where nothing is."""
    missing = [name for name in NEEDS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install {PACKAGES}"
    if os.geteuid() != 0:
        return "a SLURM on one machine needs root, for network namespaces"
    probe = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    return "" if probe.returncode == 0 else "this machine allows no network namespaces"


@dataclass(frozen=True)
class Slurm:
    """A running cluster. Every node's network is called eth0."""

    folder: Path
    tag: str

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def words(self, node: str, command: Sequence[str]) -> list[str]:
        """A command as it runs on a node."""
        return ["nsenter", f"--net=/run/netns/{self.tag}-{node}", *command]

    def run(self, *command: str) -> str:
        """What a command of SLURM prints on the login node."""
        words = self.words("login", command)
        return subprocess.run(words, env=self.environment, check=True, capture_output=True, text=True).stdout.strip()

    def jobs(self, state: str = "pending,running,completing") -> list[str]:
        """The numbers of the jobs that are in one of these states."""
        return self.run("squeue", "--noheader", "--format=%A", f"--states={state}").split()


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """Starts the cluster and waits until both nodes are idle; afterwards its processes and networks are gone."""
    tag = f"bl{uuid.uuid4().hex[:6]}"
    folder.mkdir(parents=True)
    for name in ("state", *(f"spool-{node}" for node in NODES)):  # SLURM makes none of them
        (folder / name).mkdir()
    cluster = Slurm(folder, tag)
    prefix = f"10.{200 + os.getpid() % 50}.{time.time_ns() % 250}"
    (folder / "slurm.conf").write_text(
        CONF.format(folder=folder, prefix=prefix, host=os.uname().nodename.split(".")[0])
    )
    (folder / "cgroup.conf").write_text(CGROUP_CONF)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    with _network(tag, prefix), contextlib.ExitStack() as stack:
        files = [f"--{name}-file={folder / f'munge.{name}'}" for name in ("key", "pid", "log", "seed")]
        munge = ["munged", "--foreground", "--force", f"--socket={folder / 'munge.socket'}", *files]
        stack.enter_context(_daemon(cluster, "login", munge))
        _wait(lambda: (folder / "munge.socket").exists(), "munge", folder)
        stack.enter_context(_daemon(cluster, "login", ["slurmctld", "-D"]))
        names = folder / "hosts"
        names.write_text(f"127.0.0.1 localhost\n{prefix}.11 n1\n{prefix}.12 n2\n")
        apart = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", ENTER, "bash"]
        for node in NODES:
            command = [*apart, node, str(names), "slurmd", "-D", "-N", node]
            stack.enter_context(_daemon(cluster, node, command))
        _wait(lambda: _num_idle(cluster) == len(NODES), "SLURM", folder)
        yield cluster
        subprocess.run(
            cluster.words("login", ["scancel", "--full", "--user=root"]), env=cluster.environment, check=False
        )
        # The tests are over; jobs that linger die with their namespaces.
        with contextlib.suppress(AssertionError, subprocess.CalledProcessError):
            _wait(lambda: not cluster.jobs(), "the last job's end", folder)


@contextlib.contextmanager
def _network(tag: str, prefix: str) -> Iterator[None]:
    """A namespace for each node, joined by a bridge."""
    hosts = {"login": 10, "n1": 11, "n2": 12}
    try:
        _ip("link", "add", tag, "type", "bridge")
        _ip("link", "set", tag, "up")
        for number, (node, last) in enumerate(hosts.items()):
            space, outer = f"{tag}-{node}", f"{tag}v{number}"
            _ip("netns", "add", space)
            _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", outer, "master", tag, "up")
            _ip("-n", space, "addr", "add", f"{prefix}.{last}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")
        yield
    finally:
        for node in hosts:
            subprocess.run(["ip", "netns", "delete", f"{tag}-{node}"], capture_output=True, check=False)
        subprocess.run(["ip", "link", "delete", tag], capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def _daemon(cluster: Slurm, node: str, command: Sequence[str]) -> Iterator[None]:
    """A process on a node, as long as the block."""
    with open(cluster.folder / f"{node}-{Path(command[0]).name}.out", "w") as out:
        process = subprocess.Popen(
            cluster.words(node, command), env=cluster.environment, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _num_idle(cluster: Slurm) -> int:
    try:
        return cluster.run("sinfo", "--noheader", "--Node", "--format=%t").split().count("idle")
    except subprocess.CalledProcessError:  # the controller is not up yet
        return 0


def _wait(what: object, name: str, folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        logs = "\n".join(
            f"{path.name}:\n{path.read_text()[-800:]}" for path in [*folder.glob("*.log"), *folder.glob("*.out")]
        )
        assert time.monotonic() < deadline, f"{name} does not come\n{logs}"
        time.sleep(0.2)
