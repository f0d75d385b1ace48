"""What the doctor makes of the facts: for each host and check one line, `ok` or `FAIL` with what mends it.

In:  the facts of every host that answered (train/doctor_probe.py), in the hostfile's order, and the hosts.
Out: a list of `Line`, of these and of the all-reduces between pairs. Hosts are compared with each other: the odd one
out is named, not the many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from train.hostfile import Host

Facts = dict[str, Any]  # by the name of the fact
Found = dict[str, Facts]  # by the name of the host

MAX_SKEW_S = 1.0
MIN_WRITE_BYTES_S = 10e6
MIN_FREE_BYTES = 2 * 2**30
MIN_OPEN_FILES = 4096
SHM_BYTES = 64 * 2**20  # a rank on the CPU
SHM_BYTES_GPU = 2**30  # a host with GPUs
MAX_USED_MIB = 1024  # of a free GPU: contexts of the driver and its services


@dataclass(frozen=True)
class Line:
    """One check on one host; `fix` is empty where all is well."""

    host: str
    check: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        verdict = f"FAIL  {self.text.rstrip('.')}. Fix: {self.fix}" if self.fix else f"ok    {self.text}"
        return f"{self.host:<16} {self.check:<11} {verdict}"


@dataclass(frozen=True)
class Context:
    """What the checks know besides the facts: the hosts with their slots, and the bytes that the run will write."""

    hosts: list[Host]
    needed_bytes: float = MIN_FREE_BYTES

    def slots(self, host: str) -> int:
        """The ranks of a host."""
        return next(one.slots for one in self.hosts if one.name == host)


def lines(found: Found, context: Context) -> list[Line]:
    """Every check on every host that answered."""
    return [line for _, check in CHECKS for line in check(found, context)]


def _split(found: Found, fact: str, fix: str) -> tuple[list[Line], dict[str, Any]]:
    """A FAIL for each host whose fact is an error, and the facts of the others."""
    facts = {host: its[fact] for host, its in found.items() if fact in its}
    errors = {host: its["error"] for host, its in facts.items() if isinstance(its, Mapping) and "error" in its}
    bad = [Line(host, fact, error, fix) for host, error in errors.items()]
    return bad, {host: its for host, its in facts.items() if host not in errors}


def _same(check: str, facts: Mapping[str, str], fix: str, texts: Mapping[str, str] | None = None) -> Iterator[Line]:
    """A FAIL for each host whose fact is not what most hosts have (what the first one has, where there is no most)."""
    texts = texts or facts
    common = Counter(facts.values()).most_common(1)[0][0] if facts else ""
    alone = "; one host: nothing to compare" if len(facts) == 1 else ""
    for host, fact in facts.items():
        if fact == common:
            yield Line(host, check, texts[host] + alone)
        else:
            other = next(name for name, its in facts.items() if its == common)
            yield Line(host, check, f"{texts[host]}, but {other} has {texts[other]}", fix)


def _python(found: Found, context: Context) -> Iterator[Line]:
    bad, good = _split(found, "python", "look at the host")
    yield from bad
    yield from _same("python", good, "give every host the same Python, best in one shared folder (`make install`)")


def _versions(found: Found, context: Context) -> Iterator[Line]:
    bad, good = _split(found, "versions", "run `make install` there")
    yield from bad
    texts = {host: ", ".join(f"{name} {version}" for name, version in facts.items()) for host, facts in good.items()}
    yield from _same("versions", texts, "run `make install` there: constraints.txt fixes the versions")


def _code(found: Found, context: Context) -> Iterator[Line]:
    bad, good = _split(found, "code", "put it there (`make stage`), or share the folder")
    yield from bad
    texts = {
        host: f"digest {its['digest'][:12]}, revision {its['revision'] or 'unknown'}" for host, its in good.items()
    }
    fix = "check out the same revision there, without changes of its own, or share the folder"
    yield from _same("code", {host: its["digest"] for host, its in good.items()}, fix, texts)


def _config(found: Found, context: Context) -> Iterator[Line]:
    yield from _same_digest(found, "config", "copy the run's YAML to this host, or share the folder")


def _store(found: Found, context: Context) -> Iterator[Line]:
    fix = "mount the store at the same path there, or copy it (`make verify STORE=…` checks a copy)"
    yield from _same_digest(found, "store", fix)


def _same_digest(found: Found, check: str, fix: str) -> Iterator[Line]:
    bad, good = _split(found, check, fix)
    yield from bad
    yield from _same(check, good, fix, {host: f"digest {digest[:12]}" for host, digest in good.items()})


def _gpus(found: Found, context: Context) -> Iterator[Line]:
    bad, good = _split(found, "gpus", "run `nvidia-smi` there; reset or drain the node")
    yield from bad
    some = any(facts["gpus"] for facts in good.values())
    for host, facts in good.items():
        number, usable, slots = len(facts["gpus"]), facts["torch"], context.slots(host)
        text = f"{number} GPU(s), {usable} of them for torch, slots={slots}"
        if not some:
            yield Line(host, "gpus", f"none: {slots} rank(s) on the CPU, {found[host].get('num_cores', '?')} core(s)")
        elif number != slots:
            yield Line(host, "gpus", text, f"run `make hostfile SLOTS={number or 'N'}`, or leave the host out")
        elif usable != number:
            yield Line(host, "gpus", text, "torch needs a newer driver, a CUDA build, or CUDA_VISIBLE_DEVICES unset")
        else:
            yield Line(host, "gpus", f"{text}, {facts['gpus'][0][1]}")
    drivers = {host: facts["gpus"][0][0] for host, facts in good.items() if facts["gpus"]}
    yield from _same("driver", drivers, "install the same driver on every host")
    for host, facts in good.items():
        if facts["gpus"]:
            yield _gpu_memory(host, facts["gpus"])


def _gpu_memory(host: str, gpus: list[list[str]]) -> Line:
    used = {number: int(gpu[2]) for number, gpu in enumerate(gpus)}
    busy = [f"GPU {i} has {mib} of {gpus[i][3]} MiB in use" for i, mib in used.items() if mib > MAX_USED_MIB]
    if busy:
        return Line(host, "gpu memory", ", ".join(busy), "end who uses it: `nvidia-smi` there names the processes")
    return Line(host, "gpu memory", f"at least {min(int(gpu[3]) - int(gpu[2]) for gpu in gpus)} MiB free on each GPU")


def _processes(found: Found, context: Context) -> Iterator[Line]:
    bad, good = _split(found, "processes", "look at the host")
    yield from bad
    for host, alive in good.items():
        numbers = " ".join(line.split()[0] for line in alive)
        text = f"{len(alive)} rank(s) of an earlier or another run: {'; '.join(alive)}"
        fix = f"if that run is not wanted, `kill {numbers}` there" if alive else ""
        yield Line(host, "processes", text if alive else "no rank of an earlier run", fix)


def _locks(found: Found, context: Context) -> Iterator[Line]:
    """On a shared disk the holder of a lock may be a process of another host: what one host sees held, is held."""
    bad, good = _split(found, "locks", "look at TORCH_EXTENSIONS_DIR there")
    yield from bad
    held = {key for locks in good.values() for key, lock in locks.items() if lock["held"]}
    for host, locks in good.items():
        stale = [key.rpartition(" ")[0] for key in locks if key not in held]
        if stale:
            oldest_s = max(lock["age_s"] for lock in locks.values())
            text = f"{len(stale)} compile lock(s) that nobody holds, {oldest_s:.0f} s old"
            fix = f"remove {' '.join(stale)} there: every rank would wait for it for ever"
            yield Line(host, "locks", text, fix)
        else:
            yield Line(host, "locks", "no stale compile lock")


def _disk(found: Found, context: Context) -> Iterator[Line]:
    bad, good = _split(found, "disk", "give OUT a folder that every host can write")
    yield from bad
    for host, facts in good.items():
        free, speed = facts["free"], facts["write_bytes_s"]
        text = f"{facts['folder']}: {free / 1e9:.1f} GB free, {speed / 1e6:.0f} MB/s with fsync"
        fix = ""
        if free < context.needed_bytes:
            fix = f"free {context.needed_bytes / 1e9:.1f} GB for the checkpoints, or give another OUT"
        elif not facts["shared"]:
            text += ", not the folder that the others see"
            fix = "give OUT a folder of a shared file system: every rank writes its part of a checkpoint there"
        elif speed < MIN_WRITE_BYTES_S:
            fix = f"expected {MIN_WRITE_BYTES_S / 1e6:.0f} MB/s; give OUT a faster disk, or ask who loads this one"
        yield Line(host, "disk", text, fix)


def _clock(found: Found, context: Context) -> Iterator[Line]:
    """A clock is wrong for certain if an answer was begun before it was asked for, or ended after it had come."""
    for host, facts in found.items():
        behind_s, ahead_s = facts["asked_s"] - facts["started_s"], facts["ended_s"] - facts["answered_s"]
        skew_s = max(behind_s, ahead_s)
        if skew_s > MAX_SKEW_S:
            word = "behind" if behind_s > ahead_s else "ahead"
            fix = "start chrony or ntpd there; stale files and certificates are judged by the clock"
            yield Line(host, "clock", f"{skew_s:.1f} s or more {word} of this machine", fix)
        else:
            yield Line(host, "clock", f"within what the answer took ({facts['answered_s'] - facts['asked_s']:.1f} s)")


def _interface(found: Found, context: Context) -> Iterator[Line]:
    bad, good = _split(found, "interface", "give the hosts names that resolve on every host")
    yield from bad
    fastest = max((its["mbit_s"] for its in good.values()), default=0)
    most_ports = max((_active(its["infiniband"]) for its in good.values()), default=0)
    for host, its in good.items():
        text = f"{its['name'] or '?'} ({its['address']}, {_rate(its['mbit_s'])})"
        text += "".join(f", InfiniBand {port} {state}" for port, state in its["infiniband"].items())
        problem, fix = "; one host: nothing to compare" if len(good) == 1 else "", ""
        if missing := _missing_names(its):
            problem, fix = f"; {missing} is not there", f"set it to one of {' '.join(its['names'])}"
        elif 0 < its["mbit_s"] < fastest:
            fix = f"others have {_rate(fastest)}: look at the cable and the switch"
        elif _active(its["infiniband"]) < most_ports:
            fix = f"others have {most_ports} active InfiniBand port(s): `ibstat` there"
        yield Line(host, "interface", text + problem, fix)


def _rate(mbit_s: int) -> str:
    return f"{mbit_s / 1000:g} Gbit/s" if mbit_s else "speed unknown"


def _has_gpu(facts: Facts) -> bool:
    return bool(facts.get("gpus", {}).get("gpus"))


def _active(ports: Mapping[str, str]) -> int:
    return sum(state.startswith("ACTIVE") for state in ports.values())


def _missing_names(facts: Facts) -> str:
    """A variable that names an interface which is not there; NCCL takes prefixes, =names and ^exceptions."""
    for variable, value in facts["env"].items():
        wanted = [name for name in value.split(",") if name]
        exact = variable.startswith("GLOO") or value.startswith("=")
        if value.startswith("^"):
            continue
        for name in (name.lstrip("=") for name in wanted):
            if not any(there == name if exact else there.startswith(name) for there in facts["names"]):
                return f"{variable}={value}"
    return ""


def _limits(found: Found, context: Context) -> Iterator[Line]:
    bad, good = _split(found, "limits", "look at the host")
    yield from bad
    for host, limits in good.items():
        files, locked = limits["nofile"], limits["memlock"]
        text = f"{files} open files, {'unlimited' if locked < 0 else f'{locked // 2**20} MiB of'} locked memory"
        has_infiniband = bool(_active(found[host].get("interface", {}).get("infiniband", {})))
        if 0 <= files < MIN_OPEN_FILES:
            yield Line(
                host, "limits", text, f"raise `ulimit -n` to {MIN_OPEN_FILES} or more (limits.conf, sshd, slurmd)"
            )
        elif has_infiniband and locked >= 0:
            yield Line(host, "limits", text, "InfiniBand needs `ulimit -l unlimited` (limits.conf, sshd, slurmd)")
        else:
            yield Line(host, "limits", text)


def _shm(found: Found, context: Context) -> Iterator[Line]:
    bad, good = _split(found, "shm", "mount a tmpfs on /dev/shm there")
    yield from bad
    for host, size in good.items():
        needed = SHM_BYTES_GPU if _has_gpu(found[host]) else SHM_BYTES * context.slots(host)
        fix = f"{needed / 2**20:.0f} MiB are needed: remount it larger, docker --shm-size=8g, an emptyDir in memory"
        yield Line(host, "shm", f"/dev/shm has {size / 2**20:.0f} MiB", fix if size < needed else "")


def all_reduce(results: list[Facts]) -> list[Line]:
    """A line for each host: how fast it is with whom, and which pairs failed or are slow.

    A host is slow if its best pair is below half of what the hosts' best pairs have in the middle; a pair, if it is
    below half of the best of either of its two.
    """
    rates = {tuple(result["pair"]): result["gbit_s"] for result in results if "gbit_s" in result}
    errors = {tuple(result["pair"]): result["error"] for result in results if "error" in result}
    names = list(dict.fromkeys(name for result in results for name in result["pair"]))
    best = {name: max((rate for pair, rate in rates.items() if name in pair), default=0.0) for name in names}
    middle = median(best.values()) if best else 0.0
    said = []
    for name in names:
        own = {pair: rate for pair, rate in rates.items() if name in pair}
        slow = [pair for pair, rate in own.items() if rate < 0.5 * min(best[other] for other in pair)]
        lost = {pair: error for pair, error in errors.items() if name in pair}
        text = f"{best[name]:.2f} Gbit/s at best, {min(own.values(), default=0.0):.2f} at worst, {len(own)} pair(s)"
        fix = ""
        if lost:
            text += "".join(f"; failed with {_other(name, pair)}: {error}" for pair, error in lost.items())
            fix = "open the ports between the two, and look at GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        elif best[name] < 0.5 * middle:
            fix = f"this host is slow, others reach {middle:.2f} Gbit/s: look at its cable, port and load"
        elif slow:
            text += "".join(f"; slow with {_other(name, pair)}: {own[pair]:.2f}" for pair in slow)
            fix = "look at the way between the two (cable, switch, route)"
        said.append(Line(name, "all-reduce", text, fix))
    return said


def _other(name: str, pair: tuple[str, ...]) -> str:
    return next(other for other in pair if other != name)


CHECKS: list[tuple[str, Callable[[Found, Context], Iterator[Line]]]] = [
    ("python: the same everywhere", _python),
    ("versions: torch, deepspeed and others the same everywhere", _versions),
    ("code: the same digest everywhere, and the git revision", _code),
    ("config: the run's YAML is visible, the same everywhere", _config),
    ("store: visible, the same digest everywhere", _store),
    ("gpus, driver, gpu memory: as many as slots, usable by torch, the same driver, nobody on them", _gpus),
    ("processes: no rank of an earlier run", _processes),
    ("locks: no stale compile lock", _locks),
    ("disk: space and write speed of the run folder, the same folder everywhere", _disk),
    ("clock: within a second of this machine's", _clock),
    ("interface: what leads to the other hosts, its speed, InfiniBand's ports", _interface),
    ("limits: open files, locked memory", _limits),
    ("shm: size of /dev/shm", _shm),
]
