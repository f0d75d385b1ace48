"""Watch the ranks of all hosts until they have ended, one fails, one is late, or a host is lost; name it.

In:  hosts (this machine's `Ranks`, or `Node`s), signals to the launcher. Out: an `Outcome`; what rank 0 says on our
stdout, and what went wrong on stderr: host, rank, what was seen, what to do.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

from train.events import Event, Exit, Looked, Lost, Output, Pulse, Said
from train.exit_codes import HUNG, LOST, STOPPED
from train.ranks import say
from train.stacks import STACKS_S, Stand
from train.watchdog import Watchdog, explain

STOP_GRACE_S = 120.0  # between a signal to the launcher and SIGKILL: long enough to save a checkpoint
SETTLE_S = 0.5  # ranks that fail this soon after the first may be its victims or its cause
TICK_S = 0.05
VICTIMS_S = 10.0  # the same where all are victims: a host that has gone without a word is lost by then
# What a healthy rank says when a peer has gone: such a rank is a victim, another one the cause.
VICTIM = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|remote process exited|Connection refused|rank 0 does not answer"
)
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Group(Protocol):
    """The ranks of one host."""

    name: str
    ranks: range

    def poll(self) -> list[Event]: ...
    def send_signal(self, number: int) -> None: ...
    def look(self, ranks: Sequence[int]) -> None: ...
    def terminate(self) -> None: ...
    def finish(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a launch ended; where something went wrong, what, on which hosts and ranks, and what was said of it."""

    code: int
    what: str = ""  # "", "rank failed", "rank killed", "late", or what a Lost has
    hosts: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    said: str = ""
    step: int | None = None  # of the furthest rank that was heard
    noticed_s: float = 0.0  # how long nothing had been heard of it


class Signals:
    """While open, signals to this process are noted instead of acted on; the watching loop passes them on."""

    def __init__(self) -> None:
        self.stop: int | None = None
        self.is_leaving = False  # the ranks were asked to save and leave, by whichever signal
        self.num_stops = 0
        self.waiting: list[int] = []
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (*_STOP_SIGNALS, signal.SIGUSR1, signal.SIGTSTP):
                if number is not signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # respect nohup
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave back, it takes

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.waiting.append(number)
        self.is_leaving = self.is_leaving or number != signal.SIGTSTP
        if number in _STOP_SIGNALS:
            self.stop = self.stop or number
            self.num_stops += 1

    def pass_on(self, groups: Sequence[Group]) -> None:
        """Send each noted signal to all ranks."""
        while self.waiting:
            number = self.waiting.pop(0)
            if number == signal.SIGTSTP:
                if any(group.name for group in groups):
                    say("launch: not stopped by Ctrl-Z: other hosts would end their ranks. Use tmux, or nohup.")
                else:
                    os.kill(os.getpid(), signal.SIGSTOP)
                continue
            num_ranks = sum(len(group.ranks) for group in groups)
            say(f"launch: {signal.Signals(number).name}, passed on to {num_ranks} process(es)")
            for group in groups:
                group.send_signal(number)


class Supervision:
    """One launch, from the start of its ranks to the end of all."""

    def __init__(self, groups: Sequence[Group], signals: Signals) -> None:
        self._groups, self._signals, self._watchdog = groups, signals, Watchdog()
        self._num_ranks = sum(len(group.ranks) for group in groups)
        self._codes = dict[int, int]()
        self._failures = list[tuple[Group, Exit | Lost]]()
        self._stands = dict[int, Stand]()

    def watch(self) -> Outcome:
        """Return how it ended, once what is wrong has been said, and nothing is left on any host."""
        try:
            return self._watch()
        finally:
            end(self._groups)
            self._hear()  # the last words of rank 0

    def _watch(self) -> Outcome:
        deadline_s = float("inf")
        while len(self._codes) < self._num_ranks:
            self._signals.pass_on(self._groups)
            if self._signals.stop is not None:
                deadline_s = min(deadline_s, time.monotonic() + STOP_GRACE_S)
                if self._signals.num_stops > 1 or time.monotonic() > deadline_s:
                    break
            self._hear()
            if self._failures and self._signals.stop is None:
                return self._failed()
            if late := self._watchdog.late():
                return self._late(late)
            time.sleep(TICK_S)
        codes = list(self._codes.values())
        if self._signals.stop is not None and codes != [STOPPED] * self._num_ranks:
            return Outcome(code=128 + self._signals.stop, step=self._watchdog.step)
        return Outcome(code=max(codes), step=self._watchdog.step)

    def _hear(self) -> None:
        for group in self._groups:
            for event in group.poll():
                self._note(group, event)

    def _note(self, group: Group, event: Event) -> None:
        if isinstance(event, Output):
            with contextlib.suppress(OSError):  # nobody reads our stdout (`| head`): no reason to end a run
                sys.stdout.write(event.text)
                sys.stdout.flush()
        elif isinstance(event, Said):
            say(f"launch: {group.name}: {event.text}")
        elif isinstance(event, Pulse):
            self._watchdog.hear(group.name, event)
        elif isinstance(event, Looked):
            self._stands |= {stand.rank: stand for stand in event.stands}
        elif isinstance(event, Exit):
            self._codes[event.rank] = event.code
            if event.code not in (0, STOPPED):
                self._failures.append((group, event))
        elif isinstance(event, Lost):
            self._codes |= dict.fromkeys(group.ranks, LOST)
            self._failures.append((group, event))

    def _failed(self) -> Outcome:
        """The first that failed, unless it only complains of a lost peer and another failed at the same time."""
        began_s, patience_s = time.monotonic(), VICTIMS_S if len(self._groups) > 1 else SETTLE_S
        while time.monotonic() - began_s < (SETTLE_S if self._causes() else patience_s):
            time.sleep(TICK_S)
            self._hear()
        causes = self._causes()
        lost = [(group, one) for group, one in causes if isinstance(one, Lost)]
        group, cause = (lost or causes or self._failures)[0]
        if isinstance(cause, Exit):
            return self._exited(group, cause)
        others = "; the others were stopped" if len(self._groups) > 1 else ""
        for group, one in lost:
            say(
                f"launch: {group.name} ({ranks_in_words(group.ranks)} of {self._num_ranks}) is lost: {one.why}{others}."
                f" `make doctor` says what is wrong with it."
            )
        return Outcome(
            code=LOST,
            what=lost[0][1].what,
            hosts=tuple(group.name for group, _ in lost),
            ranks=tuple(rank for group, _ in lost for rank in group.ranks),
            said=cause.why,
            step=self._watchdog.step,
            noticed_s=max(one.silent_s for _, one in lost),
        )

    def _causes(self) -> list[tuple[Group, Exit | Lost]]:
        return [(g, one) for g, one in self._failures if isinstance(one, Lost) or not VICTIM.search(one.lines)]

    def _exited(self, group: Group, cause: Exit) -> Outcome:
        place = f" on {group.name}" if group.name else ""
        others = f" of {self._num_ranks}{place} failed first and the others were stopped"
        lines = cause.lines.replace("\n", "\n  | ")
        say(
            f"launch: rank {cause.rank}{others if self._num_ranks > 1 else f'{place} failed'}: {_describe(cause.code)}."
            f" Its last lines ({cause.log}):\n  | {lines}"
        )
        return Outcome(
            code=cause.code if cause.code > 0 else 128 - cause.code,
            what="rank failed" if cause.code > 0 else "rank killed",
            hosts=(group.name,),
            ranks=(cause.rank,),
            said=cause.lines.rpartition("\n")[2] if cause.code > 0 else _describe(cause.code),
            step=self._watchdog.step,
        )

    def _late(self, late: list[int]) -> Outcome:
        asked = set[int]()
        for group in self._groups:
            if own := [rank for rank in late if rank in group.ranks]:
                group.look(own)
                asked |= {*own}
        deadline_s = time.monotonic() + STACKS_S + 1.0
        while not asked <= self._stands.keys() and time.monotonic() < deadline_s:
            time.sleep(TICK_S)
            self._hear()
        named, text = explain(self._watchdog.seen(late), self._stands)
        say(text)
        hosts = {group.name: None for group in self._groups if any(rank in group.ranks for rank in named)}
        return Outcome(
            code=HUNG,
            what="late",
            hosts=tuple(hosts),
            ranks=tuple(named),
            said=text.partition("\n")[0],
            step=self._watchdog.step,
            noticed_s=self._watchdog.silent_s(named),
        )


def end(groups: Sequence[Group]) -> None:
    """End the ranks of all hosts at the same time."""
    for group in groups:
        group.terminate()
    for group in groups:
        group.finish()


def ranks_in_words(ranks: range) -> str:
    """`rank 3`, or `ranks 8 to 15`."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no rank"


def _describe(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    hint = " (out of memory? see `dmesg`)" if -code == signal.SIGKILL else ""
    return f"signal {signal.Signals(-code).name}{hint}"
