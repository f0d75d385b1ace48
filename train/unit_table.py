"""The unit table: one learned row per source, outside ZeRO, with its own sparse optimizer.

In: rows of a batch's sources. Out: `unit_embeds`, a leaf whose gradient comes back to the rows that were used.
Rows are known by a stable key, so that a table can be saved, merged and carried to another store.
"""

import hashlib

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

BETAS = (0.9, 0.99)
EPS = 1e-8


def initial_row(key: str, size: int) -> Tensor:
    """A row (E,) before anything is learned: standard normal, drawn from the key alone.

    Rows must differ from the start: were they all zero, units could be told apart only after the heads have learned to
    read them, and the heads only after that (CONTRIBUTING.md, 2026-11-22).
    """
    digest = np.frombuffer(hashlib.sha256(key.encode()).digest()[:16], np.uint64)
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=digest)).standard_normal(size, np.float32))


class UnitTable:
    """Rows (R, E) with Adam's moments and a step count of their own: an untouched row does not move."""

    def __init__(self, keys: list[str], size: int, device: torch.device, averages: bool = False) -> None:
        """`averages`: keep a running average of the rows beside them."""
        self.keys = keys
        num_rows = len(keys)
        rows = [initial_row(key, size) for key in keys]
        self.weight = (torch.stack(rows) if rows else torch.zeros(0, size)).to(device)
        self.moment1 = torch.zeros_like(self.weight)
        self.moment2 = torch.zeros_like(self.weight)
        self.num_updates = torch.zeros(num_rows, device=device, dtype=torch.int64)
        self.average = self.weight.clone() if averages else None
        self._gradient = torch.zeros(num_rows, size + 1, device=device)  # the last column counts uses
        self._used: list[tuple[Tensor, Tensor]] = []

    def lookup(self, rows_BS: Tensor) -> Tensor:
        """`unit_embeds` (B, S, E) of rows (B, S); row -1 is absent: zeros, and no gradient."""
        embeds = self.weight[rows_BS.clamp(min=0)] * (rows_BS >= 0)[..., None]
        embeds.requires_grad_(True)
        self._used.append((rows_BS, embeds))
        return embeds

    def accumulate(self) -> None:
        """Take the gradients of all lookups since the last call; after each backward."""
        for rows_BS, embeds in self._used:
            if embeds.grad is None:
                continue
            present = rows_BS >= 0
            gradient = torch.cat([embeds.grad.float(), torch.ones_like(embeds.grad[..., :1])], dim=-1)
            self._gradient.index_add_(0, rows_BS[present], gradient[present])
        self._used.clear()

    def step(self, lr: float, keep: float = 0.0) -> None:
        """One Adam step (Kingma & Ba 2015) on the rows that any rank used; gradients are the mean over ranks.

        `keep` is what the average of these rows keeps of itself.
        """
        self.accumulate()
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if world_size > 1:
            dist.all_reduce(self._gradient)
        touched = self._gradient[:, -1] > 0
        gradient = self._gradient[touched, :-1] / world_size
        self._gradient.zero_()
        self.num_updates[touched] += 1
        count = self.num_updates[touched][:, None].float()
        first, second = BETAS
        moment1 = self.moment1[touched].lerp(gradient, 1 - first)
        moment2 = self.moment2[touched].lerp(gradient**2, 1 - second)
        self.moment1[touched], self.moment2[touched] = moment1, moment2
        scale = (moment2 / (1 - second**count)).sqrt() + EPS
        self.weight[touched] -= lr * moment1 / (1 - first**count) / scale
        if self.average is not None:
            self.average[touched] = self.average[touched].lerp(self.weight[touched], 1 - keep)

    def discard(self) -> None:
        """Forget the gradients of a step that is skipped."""
        self._used.clear()
        self._gradient.zero_()

    def state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint keeps, row by row."""
        kept = {
            "weight": self.weight,
            "moment1": self.moment1,
            "moment2": self.moment2,
            "num_updates": self.num_updates,
        }
        return kept if self.average is None else {**kept, "average": self.average}

    def load(self, state: dict[str, Tensor], saved_keys: list[str]) -> int:
        """Take over the rows whose keys are known here; returns how many."""
        place = {key: row for row, key in enumerate(saved_keys)}
        pairs = [(place[key], row) for row, key in enumerate(self.keys) if key in place]
        saved, here = (
            torch.tensor(column, dtype=torch.int64) for column in (zip(*pairs, strict=True) if pairs else ((), ()))
        )
        for name, tensor in self.state().items():
            source = state["weight"] if name == "average" and name not in state else state[name]
            tensor[here] = source.to(tensor.device)[saved]
        return len(pairs)
