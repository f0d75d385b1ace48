"""What a host says of its ranks while a launch goes on, also as lines of JSON.

In: what happened. Out: an event; the same after its way through a pipe.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from train.heartbeat import Beat
from train.stacks import Stand


@dataclass(frozen=True)
class Hello:
    """An agent is there: its process, this host's address for the others, the interface, a free port, its locks."""

    pid: int
    address: str
    interface: str
    port: str
    locks: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Said:
    """Something for people that the host itself has to say."""

    text: str


@dataclass(frozen=True)
class Output:
    """What rank 0 has written."""

    text: str


@dataclass(frozen=True)
class Pulse:
    """The host is alive, and so are its ranks as far as they beat; those that were stopped by a signal."""

    beats: list[Beat] = field(default_factory=list)
    stopped: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Exit:
    """A rank has ended: with an exit code, or -n for signal n; its last lines, and the log that has more."""

    rank: int
    code: int
    lines: str
    log: str


@dataclass(frozen=True)
class Looked:
    """Where the ranks stand that were asked for."""

    stands: list[Stand]


@dataclass(frozen=True)
class Gone:
    """All ranks have ended, and the agent with them."""


@dataclass(frozen=True)
class Lost:
    """The launcher's own: a host that cannot be reached, or is not heard of any more; since when."""

    what: str  # "host unreachable", "agent missing", "agent lost", "host silent"
    why: str
    silent_s: float = 0.0


Event = Hello | Said | Output | Pulse | Exit | Looked | Gone | Lost
_KINDS = {kind.__name__: kind for kind in (Hello, Said, Output, Pulse, Exit, Looked, Gone)}


def to_line(event: Event) -> str:
    """One line of JSON."""
    return json.dumps({type(event).__name__: asdict(event)}) + "\n"


def from_line(line: str) -> Event | None:
    """The event of a line; None where it is none: a login shell may print lines of its own."""
    try:
        ((name, content),) = json.loads(line).items()
        if name == "Pulse":
            return Pulse([Beat(**beat) for beat in content["beats"]], content["stopped"])
        if name == "Looked":
            return Looked([Stand(**stand) for stand in content["stands"]])
        event: Event = _KINDS[name](**content)
        return event
    except (ValueError, KeyError, TypeError, AttributeError):  # not one of ours
        return None
