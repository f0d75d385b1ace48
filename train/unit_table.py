"""The unit table: one learned row per source, outside ZeRO, sharded over ranks, with its own sparse optimizer.

In: rows of a batch's sources. Out: `unit_embeds`, whose gradient comes back to the rows that were used.
Rows are known by a stable key, so that a table can grow, be saved, and be carried to another store or number of ranks:
a hash of the key says which rank holds a row, its moments and its counts; the others have none of it.

Shapes: R rows of the whole table, H rows held here, U rows used since the last step, E width; B, S as in a batch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import embedding

from train.table_exchange import SLOT_BITS, Routes

BETAS = (0.9, 0.99)
EPS = 1e-8


def owner_of(key: str, num_ranks: int) -> int:
    """The rank that holds a row: a function of its key, the same in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[16:24], "little") % num_ranks


def initial_rows(keys: Sequence[str], size: int) -> Tensor:
    """Rows (len(keys), E) before anything is learned: standard normal, each drawn from its key alone.

    Rows must differ from the start: were they all zero, units could be told apart only after the heads have learned to
    read them, and the heads only after that (CONTRIBUTING.md, 2026-11-22).
    """
    rows = np.empty((len(keys), size), np.float32)
    bits = np.random.Philox(key=0)
    generator, state = np.random.Generator(bits), bits.state
    for row, key in zip(rows, keys, strict=True):
        state["state"]["key"] = np.frombuffer(hashlib.sha256(key.encode()).digest()[:16], np.uint64)
        bits.state = state  # a quarter of the time that a generator for each key takes
        generator.standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(rows)


@dataclass
class Fetched:
    """Rows in use: their places (U,), in rising order; their values (U + 1, E), a leaf, the last for what is absent."""

    places: Tensor
    values: Tensor
    routes: Routes
    work: dist.Work | None

    def embeds(self, places_BS: Tensor, present_BS: Tensor) -> Tensor:
        """`unit_embeds` (B, S, E)."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        if torch.is_grad_enabled():
            self.values.requires_grad_(True)
        absent = len(self.places)
        return embedding(torch.searchsorted(self.places, places_BS).where(present_BS, absent), self.values, absent)


class UnitTable:
    """Rows with Adam's moments and a step count of their own: an untouched row does not move.

    Attributes:
        keys: of the rows held here, in the order of `state()`.
        place: where each row of the whole table is held (R,), by its number in batches (table_exchange.py).
        norm: of the whole table's gradient, the mean over ranks; known after `exchange`.
        saved_in: the sealed checkpoint these rows were loaded from or last saved in, and its step (table_files.py).
    """

    def __init__(
        self,
        keys: Sequence[str],
        size: int,
        device: torch.device,
        averages: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """`averages`: keep a running average of the rows beside them. `group`: the ranks that share the rows."""
        self._group = group
        self.keys: list[str] = []
        self.place = torch.zeros(0, dtype=torch.int64, device=device)
        rows, counts = torch.zeros(0, size, device=device), torch.zeros(0, dtype=torch.int64, device=device)
        self._state = {"weight": rows, "moment1": rows, "moment2": rows, "num_updates": counts, "moved_at": counts}
        if averages:
            self._state["average"] = rows
        self.norm = torch.zeros((), device=device)
        self.saved_in: tuple[Path, int] | None = None
        self.discard()
        self.grow(keys)

    def __len__(self) -> int:
        """Rows of the whole table, R."""
        return len(self.place)

    @property
    def weight(self) -> Tensor:
        """The rows held here (H, E)."""
        return self._state["weight"]

    def state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint keeps, row by row (H, …); `moved_at` is the last step that moved a row, or 0."""
        return self._state

    def grow(self, keys: Sequence[str]) -> None:
        """Append rows for keys that are not there yet; the others keep their numbers and every bit.

        All ranks call it, between two steps, with the same keys.
        """
        assert not self._fetched, "a step is under way"
        rank, num_ranks = (0, 1) if self._group is None else (self._group.rank(), self._group.size())
        owner = np.fromiter((owner_of(key, num_ranks) for key in keys), np.int64, len(keys))
        slot = np.empty_like(owner)
        for number, num_held in enumerate(torch.bincount(self.place >> SLOT_BITS, minlength=num_ranks).tolist()):
            slot[owner == number] = num_held + np.arange((owner == number).sum())
        self.place = torch.cat([self.place, torch.from_numpy(owner << SLOT_BITS | slot).to(self.place.device)])
        self._append([key for key, number in zip(keys, owner.tolist(), strict=True) if number == rank])

    def _append(self, keys: list[str]) -> None:
        """Hold fresh rows for these keys as well."""
        self.keys += keys
        for name, rows in self._fresh(keys).items():
            self._state[name] = torch.cat([self._state[name], rows])

    def _fresh(self, keys: list[str]) -> dict[str, Tensor]:
        """State of rows before anything is learned."""
        drawn = initial_rows(keys, self.weight.shape[1]).to(self.weight.device)
        return {
            name: drawn if name in ("weight", "average") else tensor.new_zeros(len(keys), *tensor.shape[1:])
            for name, tensor in self._state.items()
        }

    def reset(self) -> None:
        """Put the rows held here back to what they were before anything was learned: a checkpoint has no other rows."""
        moved = self._state["moved_at"].nonzero().flatten()
        for name, rows in self._fresh([self.keys[row] for row in moved.tolist()]).items():
            self._state[name][moved] = rows

    def discard(self) -> None:
        """Forget what was fetched, and its gradients: at the end of a step, or of one that is skipped."""
        self._fetched: list[Fetched] = []
        self._ahead: Fetched | None = None
        self._gradient: tuple[Tensor, Tensor] | None = None

    def fetch(self, *rows: Tensor) -> None:
        """Begin a step: gather the rows of all its micro-batches, each once; the lookups until `step` find them here.

        All ranks call it. Rows move in `step` alone, so that the exchange may go on while the first forward begins.
        """
        self.discard()
        self._ahead = self._fetch(*rows)

    def lookup(self, rows_BS: Tensor) -> Tensor:
        """`unit_embeds` (B, S, E) of rows (B, S); row -1 is absent: zeros, and no gradient.

        All ranks call it as many times, unless they have called `fetch` for these rows.
        """
        fetched = self._ahead or self._fetch(rows_BS)
        return fetched.embeds(self.place[rows_BS.clamp(min=0)], rows_BS >= 0)

    def _fetch(self, *rows: Tensor) -> Fetched:
        wanted = torch.cat([part.flatten() for part in rows])
        places = self.place[wanted[wanted >= 0]].unique()
        values = self.weight.new_zeros(len(places) + 1, self.weight.shape[1])
        routes = Routes(places, self._group)
        fetched = Fetched(places, values, routes, routes.gather(self.weight, values[:-1]))
        if torch.is_grad_enabled():
            self._fetched.append(fetched)
        return fetched

    def exchange(self) -> None:
        """Give the gradients back to the ranks that hold the rows, and take the norm of their mean over ranks.

        All ranks call it, after the last backward of a step; `step` does where nobody has.
        """
        parts = [
            part
            for fetched in self._fetched
            if fetched.values.grad is not None
            for part in fetched.routes.give_back(fetched.values.grad[:-1])
        ]
        slots = torch.cat([self.place[:0], *(slots for slots, _ in parts)]).unique()
        gradient = self.weight.new_zeros(len(slots), self.weight.shape[1])
        for its_slots, its_gradient in parts:  # in the order of ranks: the same sum in every run
            gradient[torch.searchsorted(slots, its_slots)] += its_gradient
        if self._group is not None:
            gradient /= self._group.size()
        square = gradient.square().sum()
        if self._group is not None:
            dist.all_reduce(square, group=self._group)
        self._gradient, self.norm = (slots, gradient), square.sqrt()

    def step(self, lr: float, number: int = 1, keep: float = 0.0, scale: Tensor | float = 1.0) -> None:
        """One Adam step (Kingma & Ba 2015) on the rows that any rank used.

        `number` of the step, from 1; `keep` is what the average of these rows keeps of itself; `scale` the gradient.
        """
        if self._gradient is None:
            self.exchange()
        assert self._gradient is not None
        if self.saved_in is not None and number <= self.saved_in[1]:
            self.saved_in = None  # steps are counted anew: `moved_at` does not say what has moved since that checkpoint
        slots, gradient = self._gradient
        gradient = gradient * scale
        state, (first, second) = self._state, BETAS
        state["moved_at"][slots] = number
        state["num_updates"][slots] += 1
        count = state["num_updates"][slots][:, None].float()
        moment1 = state["moment1"][slots].lerp(gradient, 1 - first)
        moment2 = state["moment2"][slots].lerp(gradient**2, 1 - second)
        state["moment1"][slots], state["moment2"][slots] = moment1, moment2
        root = (moment2 / (1 - second**count)).sqrt() + EPS
        weight = state["weight"][slots] - lr * moment1 / (1 - first**count) / root
        state["weight"][slots] = weight
        if "average" in state:
            state["average"][slots] = state["average"][slots].lerp(weight, 1 - keep)
        self.discard()

    def load(self, state: dict[str, Tensor], saved_keys: list[str]) -> int:
        """Take over the rows whose keys are held here; returns how many."""
        place = {key: row for row, key in enumerate(saved_keys)}
        pairs = [(place[key], row) for row, key in enumerate(self.keys) if key in place]
        saved, here = (
            torch.tensor(column, dtype=torch.int64) for column in (zip(*pairs, strict=True) if pairs else ((), ()))
        )
        for name, tensor in self.state().items():
            source = state["weight"] if name == "average" and name not in state else state[name]
            tensor[here] = source.to(tensor.device)[saved]
        return len(pairs)
