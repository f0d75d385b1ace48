"""One host's end of a launch: `python -m train agent MARK`, which the launcher starts there by ssh or srun.

In:  lines of JSON on stdin, which no shell reads: a question, the task, orders, and a pulse every second.
Out: lines of JSON on stdout (train/events.py), a pulse every second. It ends its ranks and itself when it is told to,
when its stdin ends, and when it hears no pulse: nothing stays where the launcher, the network or sshd has gone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import threading
import time
from pathlib import Path
from typing import Any

from train import leftovers
from train.events import Event, Exit, Gone, Hello, Pulse, Said, to_line
from train.heartbeat import PULSE_S, Silence
from train.network import free_port, way_to
from train.rank_environment import Task
from train.ranks import Ranks

LOST_S = 8.0  # without a pulse the other side is lost
KEEP_WRITING_S = 3.0  # at the end, to a launcher that reads slowly
TICK_S = 0.05
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

Order = dict[str, Any]


class Agent:
    """Ranks of this host, and the pipes to the launcher."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._orders, self._lines = queue.SimpleQueue[Order | None](), queue.SimpleQueue[str | None]()
        self._silence, self._pulsed_s = Silence(), 0.0
        self._signals, self._written = list[int](), threading.Event()
        self._ranks: Ranks | None = None
        self._left = set[int]()  # ranks that have not ended

    def run(self) -> int:
        """Until all ranks have ended, or nobody wants them any more."""
        for number in PASSED_ON:  # a batch system may send them to all processes of a job
            signal.signal(number, lambda number, _: self._signals.append(number))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for work in (self._read, self._write):
            threading.Thread(target=work, daemon=True).start()
        try:
            code = self._attend()
        finally:
            self._end_ranks()
        self._say(Gone())
        self._lines.put(None)
        self._written.wait(KEEP_WRITING_S)
        return code

    def _attend(self) -> int:
        while True:
            heard = False
            while not self._orders.empty():
                order = self._orders.get()
                if order is None or "end" in order:
                    return 0 if order else 1
                heard = True
                self._obey(order)
            if self._silence.tick(heard) > LOST_S:
                return 1
            if self._ranks is None:
                self._pulse()
                time.sleep(TICK_S)
                continue
            while self._signals:
                self._ranks.send_signal(self._signals.pop(0))
            self._pass_on(self._ranks)
            if not self._left:
                return 0
            time.sleep(TICK_S)

    def _obey(self, order: Order) -> None:
        if "question" in order:
            self._say(self._hello(**order["question"]))
        elif "task" in order:
            for path in order["stale"]:
                Path(path).unlink(missing_ok=True)
                self._say(Said(f"removed {path}: a build that was killed left it, and every rank would have waited"))
            task = Task(**order["task"])
            self._left = set(task.ranks)
            self._ranks = Ranks(task, os.environ)
        elif "signal" in order:
            self._signals.append(order["signal"])
        elif "look" in order and self._ranks is not None:
            self._ranks.look(order["look"])

    def _hello(self, peer: str, extensions: str) -> Hello:
        if ended := leftovers.end_marked(self._mark):
            self._say(Said(f"ended {len(ended)} process(es) that an earlier start of this run had left"))
        leftovers.clear_unused_memory(time.time() - leftovers.MEMORY_S)
        way = way_to(peer)
        locks = leftovers.locks(Path(extensions))
        return Hello(os.getpid(), way.address, way.interface, free_port(""), locks)

    def _pulse(self) -> None:
        if time.monotonic() - self._pulsed_s > PULSE_S:
            self._pulsed_s = time.monotonic()
            self._say(Pulse())

    def _pass_on(self, ranks: Ranks) -> None:
        for event in ranks.poll():
            self._say(event)
            if isinstance(event, Exit):
                self._left.discard(event.rank)

    def _end_ranks(self) -> None:
        if self._ranks is None:
            return
        self._ranks.terminate()
        self._ranks.finish()
        self._pass_on(self._ranks)  # their last words

    def _say(self, event: Event) -> None:
        self._lines.put(to_line(event))

    def _read(self) -> None:
        """Descriptors, not files: a thread that waits in one of those holds a lock that Python's end needs."""
        rest = b""
        with contextlib.suppress(OSError):  # the launcher has gone: as at the end of the pipe
            while chunk := os.read(0, 2**16):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self._orders.put(json.loads(line))
        self._orders.put(None)

    def _write(self) -> None:
        """In a thread: where the network is cut, this waits, and nothing else does."""
        with contextlib.suppress(OSError):  # nobody reads any more: stdin says so as well
            while (line := self._lines.get()) is not None:
                left = line.encode()
                while left:
                    left = left[os.write(1, left) :]
        self._written.set()


def configure(parser: argparse.ArgumentParser) -> None:
    """Everything but its mark comes on stdin."""
    parser.add_argument("mark", help="what the launch is called, among the processes of this host")


def main(args: argparse.Namespace) -> int:
    """Attend to one launch."""
    return Agent(args.mark).run()
