"""Eras: a run goes on with more sessions than it began with, and every window still comes as often as it should.

In: windows and weights of a store's sessions, what a checkpoint says of earlier eras. Out: the window of a position.
Turns of families whose sessions have weights of their own are dealt from an order of their own, and so are all others.
An era begins where a run is resumed with new sessions. Its first pass takes what the running pass had not seen yet and
all windows of the new sessions, each ticket once, in an order of its own; later passes take all. No window is listed:
the memory that this takes grows with the number of sessions and eras alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from prep.settings import ConfigError
from train.mixing import Pool
from train.sampler import Draw, mix, permute

_ERA = 1 << 32  # keys of eras are not those of passes
_GROUP = 1 << 35  # nor those of groups of turns
Sessions = Mapping[str, tuple[range, float]]  # of the store: the windows of each, and its weight


@dataclass(frozen=True)
class Era:
    """Which sessions a run has from a position on, beside those of the eras before."""

    first_position: int
    sessions: dict[str, tuple[int, float]]  # number of windows, weight


def eras_from(state: Mapping[str, Any]) -> list[Era]:
    """Eras as a checkpoint's state keeps them; checkpoints that are older than eras have none."""
    rows = state.get("eras", [])
    return [
        Era(row["first_position"], {key: (num, weight) for key, (num, weight) in row["sessions"].items()})
        for row in rows
    ]


def go_on(eras: Sequence[Era], sessions: Sessions, position: int) -> list[Era]:
    """The eras of a run that goes on from `position` with the sessions that are in the store now."""
    now = {key: (len(windows), weight) for key, (windows, weight) in sessions.items()}
    before = {key: what for era in eras for key, what in era.sessions.items()}
    _check_kept(before, now)
    joined = {key: what for key, what in now.items() if key not in before}
    return [*eras, Era(position if eras else 0, joined)] if joined else list(eras)


def _check_kept(before: Mapping[str, tuple[int, float]], now: Mapping[str, tuple[int, float]]) -> None:
    gone = sorted(before.keys() - now.keys())
    if gone:
        raise ConfigError(
            f"The store no longer has {len(gone)} of the sessions that this run has trained on: {', '.join(gone[:5])}. "
            "A run may get new sessions, but keeps those it has. Put them back (`make prep`), or give another OUT."
        )
    for key, (num_windows, weight) in before.items():
        if now[key][0] != num_windows:
            raise ConfigError(
                f"Session {key} has {now[key][0]} windows of the train split, but had {num_windows} when this run began"
                " with it: its recording or its recipe changed. Put it back as it was, or give another OUT."
            )
        if now[key][1] != weight:
            raise ConfigError(
                f"Session {key} has weight {now[key][1]:g}, but had {weight:g} when this run began with it. Leave "
                "data.weights of the sessions that it has as they were, or give another OUT."
            )


class Order:
    """Which window stands at a position of a run."""

    def __init__(self, begun: Sequence[Era], sessions: Sessions, seed: int, position: int = 0) -> None:
        """Of a run that has had the eras `begun` and goes on from `position`. Raises ConfigError."""
        eras = go_on(begun, sessions, position)
        self.state = [asdict(era) for era in eras]  # for JSON
        self._running: list[_Running] = []
        known: set[str] = set()
        for number, era in enumerate(eras):
            known |= era.sessions.keys()
            key = mix(seed, _ERA + number) if number else seed
            everything, joined = (
                Pool([sessions[name] for name in sessions if name in among], key)  # in the catalog's order
                for among in (known, era.sessions)
            )
            before = self._running[-1] if number else None
            self._running.append(_Running(era.first_position, key, everything, joined, before))

    def __len__(self) -> int:
        """Tickets of a pass over all sessions."""
        return self._running[-1].num_tickets if self._running else 0

    def draw(self, position: int) -> Draw:
        """The draw at a position: pass after pass, each in an order of its own."""
        era = next(era for era in reversed(self._running) if era.first_position <= position)
        pass_, place, _ = era.at(position)
        return Draw(position, era.first_pass + pass_, era.window(pass_, place))


class Orders:
    """Which window stands at a position of a run whose turns are not all dealt the same sessions."""

    def __init__(
        self,
        begun: Sequence[Era],
        sessions: Mapping[str, Sessions],
        turns: Sequence[str],
        batch_size: int,
        seed: int,
        position: int = 0,
    ) -> None:
        """As Order; `sessions` of each mix that has its own, and those of all others as "".

        `turns`: the mix of each step, one after the other and again; a step takes `batch_size` positions.
        """
        self._groups = [mix_ if mix_ in sessions else "" for mix_ in turns]
        self._batch_size = batch_size
        begun = go_on(begun, sessions[""], position)
        self.state = [asdict(era) for era in begun]  # for JSON
        self._orders: dict[str, Order] = {}
        for number, (group, own) in enumerate(sessions.items()):
            eras = [
                Era(
                    self._place(group, era.first_position),
                    {key: (num, own[key][1]) for key, (num, _) in era.sessions.items()},
                )
                for era in begun
            ]
            self._orders[group] = Order(eras, own, mix(seed, _GROUP + number) if group else seed)

    def num_tickets(self, group: str = "") -> int:
        """Of a pass over all sessions, in the turns of a mix or of those that have nothing of their own."""
        return len(self._orders[group])

    def draw(self, position: int) -> Draw:
        """The draw at a position."""
        group = self._groups[position // self._batch_size % len(self._groups)]
        return replace(self._orders[group].draw(self._place(group, position)), position=position)

    def _place(self, group: str, position: int) -> int:
        """How many positions of a group's turns come before a position."""
        step, inside = divmod(position, self._batch_size)
        cycle, turn = divmod(step, len(self._groups))
        steps = cycle * self._groups.count(group) + self._groups[:turn].count(group)
        return steps * self._batch_size + (inside if self._groups[turn] == group else 0)


class _Running:
    """One era and its passes; the first begins with what the pass that ran before it had left."""

    def __init__(
        self, first_position: int, key: int, everything: Pool, joined: Pool, before: "_Running | None"
    ) -> None:
        self.first_position, self.first_pass, self._key = first_position, 0, key
        self._everything, self._joined, self._before = everything, joined, before
        self._interrupted = self._num_seen = self._num_left = 0
        if before is not None:
            self._interrupted, self._num_seen, size = before.at(first_position)
            self._num_left = size - self._num_seen
            self.first_pass = before.first_pass + self._interrupted

    @property
    def num_tickets(self) -> int:
        """Of a pass over all its sessions."""
        return len(self._everything)

    def at(self, position: int) -> tuple[int, int, int]:
        """The pass of this era in which a position lies, its place in that pass, and the tickets of that pass."""
        place, first_size = position - self.first_position, self._num_left + len(self._joined)
        if place < first_size:
            return 0, place, first_size
        pass_, place = divmod(place - first_size, self.num_tickets)
        return 1 + pass_, place, self.num_tickets

    def window(self, pass_: int, place: int) -> int:
        """The window at a place of a pass."""
        key = mix(self._key, pass_)
        if pass_:
            return self._everything.window(pass_, permute(place, self.num_tickets, key))
        place = permute(place, self._num_left + len(self._joined), key)
        if self._before is not None and place < self._num_left:
            return self._before.window(self._interrupted, self._num_seen + place)
        return self._joined.window(0, place - self._num_left)
