"""Start one process per slot of a hostfile, watch them, and end all of them when one fails.

In:  hosts, a command (a whole argv), a folder for logs, the environment of the ranks.
Out: an exit code (0 only when every rank ended with 0), and `rank-0000r.log` per rank, or `launcher.log` where
     DeepSpeed's runner starts the ranks on other hosts. No shell is involved on this machine.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import ctypes
import os
import queue
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from train import hostfile
from train.hostfile import Host, HostfileError

KILL_GRACE_S = 5.0  # between SIGTERM and SIGKILL, after a rank has failed
RUNNER_GRACE_S = 40.0  # the same for DeepSpeed's runner, which gives its ranks 30 s
STOP_GRACE_S = 120.0  # the same after a signal to the launcher: long enough to save a checkpoint
SETTLE_S = 0.5  # ranks that fail this soon after the first may be its victims or its cause
NUM_LAST_LINES = 25
FORWARDED = re.compile(r"(DS_ACCELERATOR|OMP_NUM_THREADS|TORCH_EXTENSIONS_DIR|(GLOO|HF|BRAINLOOM|TORCH_NCCL)_\w+)$")

# What a healthy rank says when a peer has gone: such a rank is a victim, another one the cause.
_VICTIM = re.compile(r"Connection (closed|reset) by peer|Broken pipe|remote process exited|Connection refused")
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class LaunchError(ValueError):
    """A launch that cannot start; the message says what is wrong, where, and what to do."""


@dataclass(frozen=True)
class _Started:
    """A process that was started: its name in messages, its log, and where this run begins in the log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    is_runner: bool = False  # DeepSpeed's runner: it ends the ranks on other hosts if it gets SIGTERM and the time


_Exit = tuple[_Started, int]  # with its return code
_Exits = queue.SimpleQueue[_Exit]


def launch(hosts: list[Host], command: list[str], log_dir: Path, env: Mapping[str, str]) -> int:
    """Run `command` once per slot and return the first failing rank's exit code (128 + n for signal n), or 0.

    `env` is the whole environment of a rank, usually `os.environ`; RANK, WORLD_SIZE and so on are added here.
    SIGINT, SIGTERM and SIGHUP go to every rank and end the run with 128 + n, SIGUSR1 is only passed on; a second
    stop signal ends the run within seconds. Raises LaunchError or HostfileError before anything has started.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    with _Signals() as signals:
        if _all_here(hosts):
            started = _start_here(hosts[0], command, log_dir, env)
        else:
            started = [_start_elsewhere(hosts, command, log_dir, env)]
        try:
            return _supervise(started, signals)
        finally:
            _end(started)


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


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _start_here(host: Host, command: list[str], log_dir: Path, env: Mapping[str, str]) -> list[_Started]:
    for lock in clear_stale_locks(extensions_dir(env), time.time()):
        _say(f"launch: removed {lock}: a build that was killed left it, and every rank would have waited for it")
    port = _free_port()
    _say(f"launch: {host.slots} rank(s) on this machine, port {port}, logs in {log_dir}")
    started: list[_Started] = []
    try:
        for rank in range(host.slots):
            rank_env = rank_environment(rank, host.slots, port, env)
            started.append(_start(f"rank {rank}", command, log_dir / f"rank-{rank:05d}.log", rank_env))
    except BaseException:
        _end(started)
        raise
    return started


def _start(name: str, command: list[str], log: Path, env: Mapping[str, str], is_runner: bool = False) -> _Started:
    # Appended: the log of the run that failed is what a restart is about to need.
    with open(log, "ab") as file:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(env),
                process_group=0,
                preexec_fn=_die_with_parent(signal.SIGTERM if is_runner else signal.SIGKILL),
            )
        except OSError as error:
            raise LaunchError(
                f"launch: {name} cannot start {command[0]!r}: {error.strerror}; expected a program. Check the command."
            ) from None
        return _Started(name, process, log, file.tell(), is_runner)


def _die_with_parent(number: int) -> Callable[[], None] | None:
    """Linux: the kernel sends `number` to a rank when the launcher's thread that started it ends, however it ends."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)  # loaded before the fork, where little is safe
    parent = os.getpid()

    def in_child() -> None:
        libc.prctl(1, number)  # 1 is PR_SET_PDEATHSIG
        if os.getppid() != parent:  # the parent died before the call
            os._exit(1)

    return in_child


def clear_stale_locks(directory: Path, before: float) -> list[Path]:
    """Remove `*/lock` files that no process holds and that are older than `before` (seconds since 1970); return them.

    torch keeps its lock file open while it compiles and deletes it at the end. A build that was killed leaves the
    file, and every later run waits for it for ever, without a message.
    """
    stale = [lock for lock in sorted(directory.glob("*/lock")) if _is_stale(lock, before)]
    for lock in stale:
        lock.unlink(missing_ok=True)
    return stale


def _is_stale(lock: Path, before: float) -> bool:
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

    Tokens stay here: the values show in the process list of every host.
    """
    values = {key: value for key, value in env.items() if FORWARDED.match(key) and "TOKEN" not in key}
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


def _start_elsewhere(hosts: list[Host], command: list[str], log_dir: Path, env: Mapping[str, str]) -> _Started:
    runner = deepspeed_command(command, log_dir, env)
    if shutil.which("pdsh", path=env.get("PATH")) is None:
        raise LaunchError(
            "launch: found no `pdsh` on this machine; DeepSpeed's runner starts ranks on other hosts with it. "
            "Install it (Debian: `apt-get install pdsh`), or use a hostfile with this machine only."
        )
    hostfile.write(log_dir / "hostfile", hosts, "the hosts of this launch")
    hostfile.check_answers(hosts)
    (log_dir / "environment").write_text("\n".join(forwarded_environment(env)) + "\n", encoding="utf-8")
    _say(f"launch: {sum(host.slots for host in hosts)} ranks on {len(hosts)} host(s), log {log_dir / 'launcher.log'}")
    # The runner joins this name to the home and working folders: an absolute one stays as it is.
    runner_env = {**env, "DS_ENV_FILE": str((log_dir / "environment").resolve())}
    return _start("the DeepSpeed runner", runner, log_dir / "launcher.log", runner_env, is_runner=True)


class _Signals:
    """While open, signals to this process are noted instead of acted on; the watching loop passes them on."""

    def __init__(self) -> None:
        self.stop: int | None = None
        self.num_stops = 0
        self.waiting: list[int] = []
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (*_STOP_SIGNALS, signal.SIGUSR1):
                if number is not signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # respect nohup
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.waiting.append(number)
        if number in _STOP_SIGNALS:
            self.stop = self.stop or number
            self.num_stops += 1

    def pass_on(self, started: list[_Started]) -> None:
        """Send each noted signal to the ranks themselves; their helpers are theirs to end."""
        while self.waiting:
            number = self.waiting.pop(0)
            _say(f"launch: {signal.Signals(number).name}, passed on to {len(started)} process(es)")
            for one in started:
                if not one.is_runner:
                    one.process.send_signal(number)
                elif number in _STOP_SIGNALS:  # others would kill the runner and leave its ranks
                    one.process.terminate()


class _Follower:
    """Copies what is appended to a log to our stdout."""

    def __init__(self, started: _Started) -> None:
        self._log = started.log
        self._offset = started.log_start
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def copy(self) -> None:
        # No log any more, or nobody who reads our stdout (`| head`): no reason to end a run.
        with contextlib.suppress(OSError), open(self._log, "rb") as file:
            file.seek(self._offset)
            if new := file.read():
                self._offset += len(new)
                sys.stdout.write(self._decode(new))
                sys.stdout.flush()


def _supervise(started: list[_Started], signals: _Signals) -> int:
    exits: _Exits = queue.SimpleQueue()
    # One waiting thread each: the queue then holds the exits in the order in which they happened.
    for one in started:
        threading.Thread(target=lambda one=one: exits.put((one, one.process.wait())), daemon=True).start()
    follower = _Follower(started[0])
    running, deadline = len(started), float("inf")
    while running:
        signals.pass_on(started)
        if signals.stop is not None:
            deadline = min(deadline, time.monotonic() + STOP_GRACE_S)
            if signals.num_stops > 1 or time.monotonic() > deadline:
                break
        exited = _next_exit(exits, 0.1)
        follower.copy()
        if exited is None:
            continue
        running -= 1
        if exited[1] != 0 and signals.stop is None:
            return _report(_first_failure(exited, exits), started, follower)
    follower.copy()
    return 0 if signals.stop is None else 128 + signals.stop


def _next_exit(exits: _Exits, timeout_s: float) -> _Exit | None:
    try:
        return exits.get(timeout=timeout_s)
    except queue.Empty:
        return None


def _first_failure(first: _Exit, exits: _Exits) -> _Exit:
    """The first rank that failed, unless it only complains of a lost peer and another failed at the same time."""
    failures = [first]
    deadline = time.monotonic() + SETTLE_S
    while (left_s := deadline - time.monotonic()) > 0:
        if (exited := _next_exit(exits, left_s)) and exited[1] != 0:
            failures.append(exited)
    causes = [failure for failure in failures if not _VICTIM.search(_last_lines(failure[0]))]
    return (causes or failures)[0]


def _report(failure: _Exit, started: list[_Started], follower: _Follower) -> int:
    _end(started)
    follower.copy()
    one, code = failure
    lines = _last_lines(one).replace("\n", "\n  | ")
    others = f" of {len(started)} failed first and the others were stopped" if len(started) > 1 else " failed"
    _say(f"launch: {one.name}{others}: {_describe(code)}. Its last lines ({one.log}):\n  | {lines}")
    return code if code > 0 else 128 - code


def _describe(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    hint = " (out of memory? see `dmesg`)" if -code == signal.SIGKILL else ""
    return f"signal {signal.Signals(-code).name}{hint}"


def _last_lines(one: _Started) -> str:
    """The last traceback in this run's part of the log, or the last lines."""
    with open(one.log, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(one.log_start, size - 65536))
        lines = file.read().decode(errors="replace").rstrip().splitlines()
    tracebacks = [index for index, line in enumerate(lines) if "Traceback (most recent call last)" in line]
    return "\n".join(lines[tracebacks[-1] if tracebacks else 0 :][-NUM_LAST_LINES:])


def _end(started: list[_Started]) -> None:
    """SIGTERM, some seconds, then SIGKILL to the whole group of each process, so that its helpers go as well."""
    for one in started:
        one.process.terminate()
    start = time.monotonic()
    for one in started:
        deadline = start + (RUNNER_GRACE_S if one.is_runner else KILL_GRACE_S)
        with contextlib.suppress(subprocess.TimeoutExpired):
            one.process.wait(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left; macOS says the latter
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.wait()


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


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
        _say(f"{type(error).__name__}: {error}")
        return 2
