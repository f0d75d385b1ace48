"""Another host, as the launcher sees it: an agent at the other end of ssh or srun.

In:  the words that start the agent there, orders. Out: events (train/events.py), among them that the host is lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from train.agent import LOST_S
from train.events import Event, Gone, Hello, Lost, from_line
from train.heartbeat import PULSE_S, Silence
from train.hostfile import Host
from train.rank_environment import Task
from train.ranks import KILL_GRACE_S, die_with_parent

START_S = 60.0  # until an agent has said hello: Python may come from a slow shared disk
LEAVING_S = KILL_GRACE_S + 4.0  # for an agent that was told to end its ranks and itself
AGENT = [sys.executable, "-m", "train", "agent"]


class Node:
    """One host with its agent."""

    def __init__(self, host: Host, words: Callable[[Host, list[str]], list[str]], mark: str) -> None:
        self.host, self.name, self.ranks = host, host.name, range(0)
        self.hello: Hello | None = None
        self.lost: Lost | None = None
        self._is_over = False
        self._events, self._orders = queue.SimpleQueue[Event | None](), queue.SimpleQueue[str | None]()
        self._silence = Silence()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  it ends with this
        command = words(host, [*AGENT, mark])
        self._program = os.path.basename(command[0])
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                process_group=0,  # Ctrl-C is for the launcher, which passes it on
                preexec_fn=die_with_parent(),
            )
        except OSError:
            self._errors.close()
            raise
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._read, self._write)]
        for thread in self._threads:
            thread.start()

    # ---------------------------------------------------------------- orders

    def ask(self, peer: str, extensions: str) -> None:
        """The agent says hello."""
        self._order(question={"peer": peer, "extensions": extensions})

    def begin(self, task: Task, stale: list[str]) -> None:
        """Its ranks start, once stale locks have been removed."""
        self.ranks = task.ranks
        self._order(task=asdict(task), stale=stale)

    def send_signal(self, number: int) -> None:
        """To its ranks."""
        self._order(signal=int(number))

    def look(self, ranks: Sequence[int]) -> None:
        """Find out where some of its ranks stand; `poll` has the answer."""
        self._order(look=list(ranks))

    def terminate(self) -> None:
        """It ends its ranks and itself."""
        self._order(end=True)
        self._deadline_s = time.monotonic() + (LEAVING_S if self.lost is None else 0.0)

    def finish(self) -> None:
        """After `terminate`, wait until it has; who does not come to an end is lost, and ends itself."""
        if self._errors.closed:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):  # then SIGKILL
            self._process.wait(max(0.0, self._deadline_s - time.monotonic()))
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left; macOS says the latter
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._is_over = True
        self._orders.put(None)
        for thread in self._threads:
            thread.join(1.0)
        self._errors.close()

    def _order(self, **order: Any) -> None:
        self._orders.put(json.dumps(order))

    def _write(self) -> None:
        """Orders, and a pulse where there are none. In a thread: the launcher may wait for a terminal that is full."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError), self._process.stdin as pipe:  # its reader says that it has gone
            while True:
                try:
                    line = self._orders.get(timeout=PULSE_S)
                except queue.Empty:  # a pulse
                    line = "{}"
                if line is None:
                    return
                pipe.write(line.encode() + b"\n")
                pipe.flush()

    # ---------------------------------------------------------------- events

    def poll(self) -> list[Event]:
        """What has happened since the last call; to be called often. A host is lost once, and for good."""
        events, heard, is_over = list[Event](), False, False
        while not self._events.empty():
            event = self._events.get()
            heard, is_over = True, is_over or event is None
            if isinstance(event, Hello):
                self.hello = event
            if isinstance(event, Gone):
                self._is_over = True
            elif event is not None:
                events.append(event)
        silent_s = self._silence.tick(heard)
        if self.lost is None and not self._is_over and (lost := self._loss(is_over, silent_s)):
            self.lost = lost
            events.append(lost)
        return events

    def _loss(self, is_over: bool, silent_s: float) -> Lost | None:
        if is_over:
            with contextlib.suppress(subprocess.TimeoutExpired):  # its pipe is closed: the code is told as None
                self._process.wait(1.0)
            code, said = self._process.poll(), self.complaint()
            ended = f"{self._program} ended with {code}" + (f": {said}" if said else "")
            if self.hello is not None:
                return Lost("agent lost", f"its agent has gone without a word ({ended})")
            if code == 255:
                return Lost("host unreachable", f"it cannot be reached ({ended})")
            return Lost("agent missing", f"its agent does not start ({ended})")
        if self.hello is None and silent_s > START_S:
            return Lost("agent missing", f"no word of its agent within {START_S:g} s", silent_s)
        if self.hello is not None and silent_s > LOST_S:
            why = f"no pulse of its agent for {silent_s:.0f} s: the host or its network is down, or it is frozen"
            return Lost("host silent", why, silent_s)
        return None

    def complaint(self) -> str:
        """The last line on stderr, rather the agent's own than srun's."""
        descriptor = self._errors.fileno()  # the agent writes at the same place: no seeking
        said = os.pread(descriptor, 2**16, max(0, os.fstat(descriptor).st_size - 2**16))
        lines = said.decode(errors="replace").strip().splitlines()
        return ([line for line in lines if not line.startswith("srun:")] or lines or [""])[-1]

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as pipe:
            for line in pipe:
                if (event := from_line(line.decode(errors="replace"))) is not None:
                    self._events.put(event)
        self._events.put(None)
