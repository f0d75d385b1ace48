"""How far an ingest is, by session: bars on a terminal, else one line every half minute.

In: (name, shards done, shards) of each session in hand, how many are over. Out: text on stderr.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

EVERY_S = 30.0
MAX_SHOWN = 8

State = tuple[int, Sequence[tuple[str, int, int]]]  # sessions over; of each in hand its name, shards done, shards


@contextlib.contextmanager
def shown(num_sessions: int, state: Callable[[], State]) -> Iterator[Callable[[], None]]:
    """Gives what has to be called now and then to show `state`, which is asked only when something is shown."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(num_sessions, state)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        yield _bars(progress, num_sessions, state)


def _lines(num_sessions: int, state: Callable[[], State]) -> Callable[[], None]:
    said = time.monotonic()

    def show() -> None:
        nonlocal said
        if time.monotonic() - said >= EVERY_S:
            said = time.monotonic()
            print(f"prep ingest: {in_words(num_sessions, *state())}", file=sys.stderr, flush=True)

    return show


def in_words(num_sessions: int, num_over: int, in_hand: Sequence[tuple[str, int, int]]) -> str:
    """`12 of 500 sessions; a.nwb 3/40 shards, b.nwb 0/7 shards and 3 more`."""
    parts = [f"{name} {done}/{total} shards" for name, done, total in in_hand[:MAX_SHOWN]]
    more = f" and {len(in_hand) - MAX_SHOWN} more" if len(in_hand) > MAX_SHOWN else ""
    return f"{num_over} of {num_sessions} sessions" + (f"; {', '.join(parts)}{more}" if parts else "")


def _bars(progress: Progress, num_sessions: int, state: Callable[[], State]) -> Callable[[], None]:
    overall = progress.add_task("sessions", total=num_sessions)
    bars: dict[str, TaskID] = {}

    def show() -> None:
        num_over, in_hand = state()
        progress.update(overall, completed=num_over)
        for name in set(bars) - {name for name, _, _ in in_hand[:MAX_SHOWN]}:
            progress.remove_task(bars.pop(name))
        for name, done, total in in_hand[:MAX_SHOWN]:
            if name not in bars:
                bars[name] = progress.add_task(f"  {name}")
            progress.update(bars[name], completed=done, total=total)

    return show
