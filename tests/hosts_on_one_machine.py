"""Several real hosts on this one machine: each has a network, processes, a host name, /dev/shm and an sshd of its own.

In: a folder to work in, names. Out: hosts that know each other by name and let each other in; nothing of it afterwards.
They share the file system, as the nodes of a cluster do, and the CPU. Names and keys are bind mounts over /etc which
they alone see (`ip netns exec` puts /etc/netns/NAME there): the files of this machine stay as they are.
"""

import contextlib
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NEEDS = ("sshd", "ssh", "ssh-keygen", "ip", "unshare")
PACKAGES = "openssh-server openssh-client iproute2 util-linux"
LOGIN = "login"  # where commands start; it runs no ranks
PATIENCE_S = 20.0
# In the new namespaces, before the command: who this is, and shared memory that no other host sees.
ENTER = 'hostname "$1" && mount -t tmpfs -o size=512m tmpfs /dev/shm && shift && exec "$@"'
SSH_CONFIG = """
Host *
  IdentityFile {folder}/key
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking accept-new
  LogLevel ERROR
"""
SSHD_CONFIG = """
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
UsePAM no
PidFile none
MaxStartups 100
"""


def why_not() -> str:
    """What this machine lacks for it; empty where nothing is."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in NEEDS if shutil.which(name, path=path) is None]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install {PACKAGES}"
    if os.geteuid() != 0:
        return "several hosts on one machine need root, for network namespaces"
    probe = subprocess.run(["unshare", "--net", "--pid", "--uts", "--fork", "true"], capture_output=True, check=False)
    return "" if probe.returncode == 0 else "this machine allows no namespaces"


@dataclass(frozen=True)
class Hosts:
    """Hosts that run. Every host's network is called eth0; `LOGIN` is one of them."""

    folder: Path
    tag: str
    prefix: str
    names: tuple[str, ...]
    fronts: dict[str, int] = field(default_factory=dict)  # process of this machine below which are all of a host

    def space(self, name: str) -> str:
        """The network namespace of a host."""
        return f"{self.tag}-{name}"

    def address(self, name: str) -> str:
        """The address of a host."""
        return f"{self.prefix}.{10 + (LOGIN, *self.names).index(name)}"

    def words(self, name: str, command: Sequence[str]) -> list[str]:
        """A command as it runs on a host, with whatever it starts; all of that ends with it."""
        enter = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", ENTER, "sh", name]
        return ["ip", "netns", "exec", self.space(name), *enter, *command]

    def run(self, *command: str, **more: Any) -> "subprocess.CompletedProcess[str]":
        """Run a command on the login host."""
        return subprocess.run(self.words(LOGIN, command), capture_output=True, text=True, check=False, **more)

    def inside(self, name: str, *command: str) -> None:
        """Run a command of this machine that sees the files as a host does: what it mounts, that host alone sees."""
        first = Path(f"/proc/{self.fronts[name]}/task/{self.fronts[name]}/children").read_text().split()[0]
        subprocess.run(["nsenter", f"--target={first}", "--mount", "--pid", *command], check=True, capture_output=True)

    def cut(self, name: str) -> None:
        """Pull the host's cable."""
        _ip("-n", self.space(name), "link", "set", "eth0", "down")

    def mend(self, name: str) -> None:
        """Put the cable in again."""
        _ip("-n", self.space(name), "link", "set", "eth0", "up")

    def shape(self, name: str, rate: str) -> None:
        """Let no more than `rate` (as `tc` writes it, for instance 100mbit) leave the host."""
        command = [
            "tc",
            "qdisc",
            "replace",
            "dev",
            "eth0",
            "root",
            "tbf",
            "rate",
            rate,
            "burst",
            "256k",
            "latency",
            "50ms",
        ]
        subprocess.run(["ip", "netns", "exec", self.space(name), *command], check=True, capture_output=True)


@contextlib.contextmanager
def hosts(folder: Path, names: Sequence[str] = ("n1", "n2")) -> Iterator[Hosts]:
    """Start the hosts and wait until each of them lets the login host in."""
    folder.mkdir(parents=True)
    made = Hosts(
        folder, f"bh{uuid.uuid4().hex[:6]}", f"10.{100 + os.getpid() % 50}.{time.time_ns() % 250}", tuple(names)
    )
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True)
    # sshd insists on it. It stays: other tests' hosts would drop every connection without it.
    Path("/run/sshd").mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_folder(Path("/etc/netns")))
        stack.enter_context(_network(made))
        for name in made.names:
            stack.enter_context(_sshd(made, name))
        for name in made.names:
            _wait(lambda name=name: made.run("ssh", name, "true").returncode == 0, name, made)
        yield made


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[None]:
    """A folder that is gone afterwards if it was not there before, and nobody else uses it."""
    new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if new:
            with contextlib.suppress(OSError):  # others use it by now
                path.rmdir()


@contextlib.contextmanager
def _network(made: Hosts) -> Iterator[None]:
    """A namespace for each host, joined by a bridge, with files of its own in the place of /etc/hosts and /etc/ssh."""
    everyone = (LOGIN, *made.names)
    known = "".join(f"{made.address(name)} {name}\n" for name in everyone)
    try:
        _ip("link", "add", made.tag, "type", "bridge")
        _ip("link", "set", made.tag, "up")
        for number, name in enumerate(everyone):
            space, outer = made.space(name), f"{made.tag}v{number}"
            etc = Path("/etc/netns") / space
            (etc / "ssh").mkdir(parents=True)
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
            (etc / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # nobody listens: unknown names fail at once
            (etc / "ssh" / "ssh_config").write_text(SSH_CONFIG.format(folder=made.folder))
            (etc / "ssh" / "sshd_config").write_text(SSHD_CONFIG.format(folder=made.folder))
            _ip("netns", "add", space)
            _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", outer, "master", made.tag, "up")
            _ip("-n", space, "addr", "add", f"{made.address(name)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")
        yield
    finally:
        for number, name in enumerate(everyone):
            # First the cable: the kernel takes a namespace apart when it has the time.
            subprocess.run(["ip", "link", "delete", f"{made.tag}v{number}"], capture_output=True, check=False)
            subprocess.run(["ip", "netns", "delete", made.space(name)], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns") / made.space(name), ignore_errors=True)
        subprocess.run(["ip", "link", "delete", made.tag], capture_output=True, check=False)


@contextlib.contextmanager
def _sshd(made: Hosts, name: str) -> Iterator[None]:
    """The first process of a host: all others of the host end with it."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or "sshd"
    with open(made.folder / f"{name}.log", "w") as log:
        process = subprocess.Popen(
            made.words(name, [sshd, "-D", "-e"]), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        made.fronts[name] = process.pid
        try:
            yield
        finally:
            process.kill()  # of `unshare --kill-child`: the kernel ends the rest
            process.wait()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _wait(what: Any, name: str, made: Hosts) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, (
            f"{name} lets nobody in\n{(made.folder / f'{name}.log').read_text()[-2000:]}"
        )
        time.sleep(0.2)
