"""Start one process per slot of a hostfile, watch them, and end all of them when one fails.

In:  hosts, a command (a whole argv), a folder for logs, the environment of the ranks.
Out: an exit code (0 only when every rank ended with 0; exit_codes.py), and `rank-0000r.log` per rank, or `launcher.log`
     where DeepSpeed's runner starts the ranks on other hosts. No shell is involved on this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from train import hostfile
from train.hostfile import Host, HostfileError
from train.ranks import LaunchError, Signals, Started, end, say, start, supervise
from train.watchdog import Watchdog

FORWARDED = re.compile(
    r"(DS_ACCELERATOR|OMP_NUM_THREADS|TORCH_EXTENSIONS_DIR|(GLOO|HF|BRAINLOOM|TORCH_NCCL|AWS|WANDB)_\w+)$"
)
SECRET = re.compile(r"TOKEN|SECRET|API_KEY|AWS_ACCESS_KEY_ID")


def launch(hosts: list[Host], command: list[str], log_dir: Path, env: Mapping[str, str]) -> int:
    """Run `command` once per slot and return the first failing rank's exit code (128 + n for signal n), or 0.

    `env` is the whole environment of a rank, usually `os.environ`; RANK, WORLD_SIZE and so on are added here.
    SIGINT, SIGTERM and SIGHUP go to every rank and end the run with 128 + n, SIGUSR1 is only passed on; where all ranks
    have saved and left with STOPPED, that is the code. A second stop signal ends the run within seconds. A rank that
    hangs ends it with HUNG. Raises LaunchError or HostfileError before anything has started.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    watchdog, port = Watchdog(log_dir), free_port()
    with Signals() as signals:
        if _all_here(hosts):
            started = _start_here(hosts[0], command, log_dir, env, port)
        else:
            started = [_start_elsewhere(hosts, command, log_dir, env)]
        try:
            return supervise(started, signals, watchdog)
        finally:
            end(started)
            clear_shared_memory(port)


def plan(hosts: list[Host], command: list[str], log_dir: Path, env: Mapping[str, str]) -> str:
    """Return what `launch` would run, where, and with which added environment; starts and writes nothing."""
    if _all_here(hosts):
        ranks = (
            _plan_rank(rank, rank_environment(rank, hosts[0].slots, "<a free port>", env), env, log_dir)
            for rank in range(hosts[0].slots)
        )
        return "\n".join(f"{line}\n    {shlex.join(command)}" for line in ranks)
    first = 0
    lines = []
    for host in hosts:
        lines += [
            f"{host.name}: ranks {first} to {first + host.slots - 1}",
            f"    check: {shlex.join(hostfile.ssh_check(host))}",
        ]
        first += host.slots
    forwarded = "\n".join(f"    {line}" for line in forwarded_environment(env))
    lines += [f"{log_dir / 'hostfile'}: these hosts", f"{log_dir / 'environment'}:", forwarded, "this machine:"]
    return "\n".join([*lines, f"    {shlex.join(deepspeed_command(command, log_dir, env))}"])


def _plan_rank(rank: int, rank_env: Mapping[str, str], env: Mapping[str, str], log_dir: Path) -> str:
    added = " ".join(f"{key}={value}" for key, value in sorted(rank_env.items()) if env.get(key) != value)
    return f"this machine, rank {rank}, log {log_dir / f'rank-{rank:05d}.log'}:\n    {added}"


def _all_here(hosts: list[Host]) -> bool:
    if not hosts:
        raise LaunchError("launch: found no host; expected at least one. Run `make hostfile`.")
    here = [host.name for host in hosts if hostfile.is_this_machine(host.name)]
    if len(here) > 1:
        raise LaunchError(
            f"launch: the hosts {', '.join(here)} are all this machine; expected every machine once. "
            "Keep one of them, with all its ranks in slots=N."
        )
    return len(hosts) == 1 and len(here) == 1


def rank_environment(rank: int, num_ranks: int, port: str, env: Mapping[str, str]) -> dict[str, str]:
    """Return `env` with what torch.distributed and DeepSpeed read, for one rank of a run on this machine."""
    # An outer torchrun's variables would make rank 0 wait for a store that nobody serves.
    result = {key: value for key, value in env.items() if not key.startswith("TORCHELASTIC_")}
    result.update(RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK=str(rank))
    result.update(LOCAL_WORLD_SIZE=str(num_ranks), LOCAL_SIZE=str(num_ranks))
    result.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    if "DS_ACCELERATOR" not in env and not _has_cuda():
        result["DS_ACCELERATOR"] = "cpu"
    if result.get("DS_ACCELERATOR") == "cpu" and sys.platform == "linux":
        result.setdefault("GLOO_SOCKET_IFNAME", "lo")
    result.setdefault("OMP_NUM_THREADS", str(max(1, _num_cores() // num_ranks)))
    result.setdefault("PYTHONUNBUFFERED", "1")
    result.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_dir(env)))
    return result


def extensions_dir(env: Mapping[str, str]) -> Path:
    """Return where compiled ops go: TORCH_EXTENSIONS_DIR, or a folder of this install, shared with no other."""
    return Path(env.get("TORCH_EXTENSIONS_DIR") or Path(sys.prefix) / "torch_extensions")


def _has_cuda() -> bool:
    devices = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")
    if sys.platform == "linux" and not any(Path(device).exists() for device in devices):
        return False  # spares the seconds that importing torch takes
    import torch

    return torch.cuda.device_count() > 0


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_port(address: str = "127.0.0.1") -> str:
    """A port that nobody listens on at an address of this machine; "" is all of them."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return str(probe.getsockname()[1])


def clear_shared_memory(port: str) -> None:
    """Remove what DeepSpeed's ranks of this launch left in memory, 67 MB each: nobody else has our user and port."""
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{port}_*"):
        buffer.unlink(missing_ok=True)


def _start_here(host: Host, command: list[str], log_dir: Path, env: Mapping[str, str], port: str) -> list[Started]:
    for lock in clear_stale_locks(extensions_dir(env), time.time()):
        say(f"launch: removed {lock}: a build that was killed left it, and every rank would have waited for it")
    say(f"launch: {host.slots} rank(s) on this machine, port {port}, logs in {log_dir}")
    started: list[Started] = []
    try:
        for rank in range(host.slots):
            rank_env = rank_environment(rank, host.slots, port, env)
            started.append(start(f"rank {rank}", command, log_dir / f"rank-{rank:05d}.log", rank_env))
    except BaseException:
        end(started)
        raise
    return started


def clear_stale_locks(directory: Path, before: float) -> list[Path]:
    """Remove `*/lock` files that no process holds and that are older than `before` (seconds since 1970); return them.

    torch keeps its lock file open while it compiles and deletes it at the end. A build that was killed leaves the
    file, and every later run waits for it for ever, without a message.
    """
    stale = [lock for lock in sorted(directory.glob("*/lock")) if is_stale(lock, before)]
    for lock in stale:
        lock.unlink(missing_ok=True)
    return stale


def is_stale(lock: Path, before: float) -> bool:
    """Is a lock file older than `before` (seconds since 1970), and held by no process that this one can see?"""
    try:
        status = lock.stat()
    except FileNotFoundError:
        return False
    if status.st_mtime >= before or status.st_uid != os.getuid():
        return False  # another user's open files cannot be seen
    if not Path("/proc/self/fd").is_dir():
        return before - status.st_mtime > 3600  # without /proc, age is all there is
    target = str(lock.resolve())
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # the process has ended, or is another user's
            if os.readlink(link) == target:
                return False
    return True


def deepspeed_command(command: list[str], log_dir: Path, env: Mapping[str, str]) -> list[str]:
    """Return DeepSpeed's runner as an argv; `command` must be `[python, "-m", MODULE, ...]`."""
    if len(command) < 3 or command[1] != "-m":
        raise LaunchError(
            f"launch: found the command {shlex.join(command)!r}; on other hosts expected `python -m MODULE ...`. "
            "Start a module."
        )
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(log_dir / "hostfile")]
    if env.get("MASTER_ADDR"):
        runner += ["--master_addr", env["MASTER_ADDR"]]
    if env.get("MASTER_PORT"):
        runner += ["--master_port", env["MASTER_PORT"]]
    # --force_multi: with one host in the file the runner would start the ranks on *this* machine.
    runner += ["--force_multi", "--no_local_rank", "--module", command[2]]
    return runner + [quote_for_pdsh(argument) for argument in command[3:]]


def quote_for_pdsh(argument: str) -> str:
    """Quote an argument for the remote shell behind pdsh, so that DeepSpeed's own handling leaves it whole.

    DeepSpeed puts double quotes around what has a blank, escaping `"` alone; it passes on the rest as it is.
    """
    if "%" in argument or "\n" in argument:
        raise LaunchError(
            f"launch: found {argument!r}; expected arguments without `%` and line breaks, which pdsh replaces on other "
            "hosts. Put the value into the YAML file."
        )
    if " " in argument:
        return re.sub(r"([\\$`])", r"\\\1", argument)
    return shlex.quote(argument)


def forwarded_environment(env: Mapping[str, str]) -> list[str]:
    """Return KEY=VALUE lines for DeepSpeed's environment file: what its runner does not forward by itself.

    Tokens and keys stay here: the values show in the process list of every host.
    """
    values = {key: value for key, value in env.items() if FORWARDED.match(key) and not SECRET.search(key)}
    values.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_dir(env)))
    for key, value in values.items():
        if re.search(r"[^\w@+=:,./ -]", value):
            raise LaunchError(
                f"launch: found {key}={value!r}, which goes to other hosts; expected letters, digits, blanks and "
                f"`@+=:,./-_`, since a remote shell reads it. Change or unset {key}."
            )
    return _users_own_lines(env) + [f"{key}={value}" for key, value in sorted(values.items())]


def _users_own_lines(env: Mapping[str, str]) -> list[str]:
    """The files that DeepSpeed would have read, without the blank and comment lines that crash it."""
    paths = [folder / (env.get("DS_ENV_FILE") or ".deepspeed_env") for folder in (Path.home(), Path())]
    lines = [line for path in paths if path.is_file() for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "=" in line and not line.lstrip().startswith("#")]


def _start_elsewhere(hosts: list[Host], command: list[str], log_dir: Path, env: Mapping[str, str]) -> Started:
    runner = deepspeed_command(command, log_dir, env)
    if shutil.which("pdsh", path=env.get("PATH")) is None:
        raise LaunchError(
            "launch: found no `pdsh` on this machine; DeepSpeed's runner starts ranks on other hosts with it. "
            "Install it (Debian: `apt-get install pdsh`), or use a hostfile with this machine only."
        )
    hostfile.write(log_dir / "hostfile", hosts, "the hosts of this launch")
    hostfile.check_answers(hosts)
    (log_dir / "environment").write_text("\n".join(forwarded_environment(env)) + "\n", encoding="utf-8")
    if "AWS_SECRET_ACCESS_KEY" in env:
        say(
            "launch: AWS_SECRET_ACCESS_KEY stays on this machine, since a process list would show it; where the store "
            "is at s3:// and not public, the hosts need ~/.aws/credentials (AWS_PROFILE goes along) or a role."
        )
    say(f"launch: {sum(host.slots for host in hosts)} ranks on {len(hosts)} host(s), log {log_dir / 'launcher.log'}")
    # The runner joins this name to the home and working folders: an absolute one stays as it is.
    runner_env = {**env, "DS_ENV_FILE": str((log_dir / "environment").resolve())}
    return start("the DeepSpeed runner", runner, log_dir / "launcher.log", runner_env, is_runner=True)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `python -m train launch`."""
    parser.description = "Start the worker once per slot of a hostfile, watch the ranks, end all when one fails."
    parser.add_argument("--hostfile", type=Path, required=True, help="NAME slots=N lines; see hostfiles/README.md")
    parser.add_argument("--out", type=Path, default=Path("runs/launch"), help="logs go to OUT/logs (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print what would run where, and stop")
    parser.add_argument("worker", nargs="*", metavar="-- ARG", help="arguments of `python -m train worker`")


def main(args: argparse.Namespace) -> int:
    """Launch the worker; the exit code is the launch's, or 2 where it cannot start."""
    command = [sys.executable, "-m", "train", "worker", *args.worker]
    try:
        hosts = hostfile.read(args.hostfile)
        if args.dry_run:
            print(plan(hosts, command, args.out / "logs", os.environ))
            return 0
        return launch(hosts, command, args.out / "logs", os.environ)
    except (LaunchError, HostfileError, OSError) as error:
        say(f"{type(error).__name__}: {error}")
        return 2
