"""Rows of the unit table travel from the ranks that hold them to those that use them, and their gradients back.

In: where the rows that this rank uses are held. Out: these rows; the gradients of all ranks on the rows held here.
Every rank takes part in every exchange, also one that uses no row.

A place is a number: the rank that holds a row, times 2^32, plus its slot there.
Shapes: U rows that this rank uses, A rows held here that other ranks ask for, E width.
"""

import torch
import torch.distributed as dist
from torch import Tensor

SLOT_BITS = 32


class Routes:
    """Which rank has what this one uses, and who uses what is held here; two small exchanges find out."""

    def __init__(self, places: Tensor, group: dist.ProcessGroup | None) -> None:
        """`places` (U,) in rising order, each once; without a group, all rows are here."""
        self._group = group
        num_ranks = 1 if group is None else group.size()
        counts = torch.bincount(places >> SLOT_BITS, minlength=num_ranks)
        asked = torch.empty_like(counts)
        self._swap(counts, [1] * num_ranks, asked, [1] * num_ranks)
        self._num_used, self._num_asked = counts.tolist(), asked.tolist()  # of each rank's rows; by each rank
        self._slots = places.new_empty(sum(self._num_asked))
        self._swap(places & ((1 << SLOT_BITS) - 1), self._num_used, self._slots, self._num_asked)

    def gather(self, weight: Tensor, rows_UE: Tensor) -> dist.Work | None:
        """Begin to fill `rows_UE`, in the order of the places; it is there once the result's `wait` returns."""
        return self._start(weight[self._slots], self._num_asked, rows_UE, self._num_used)

    def give_back(self, gradient_UE: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Slots (A,) and gradients (A, E) of rows that are held here, from each rank, in the order of the ranks."""
        received = gradient_UE.new_empty(len(self._slots), gradient_UE.shape[1])
        self._swap(gradient_UE, self._num_used, received, self._num_asked)
        return list(zip(self._slots.split(self._num_asked), received.split(self._num_asked), strict=True))

    def _swap(self, given: Tensor, num_given: list[int], taken: Tensor, num_taken: list[int]) -> None:
        work = self._start(given, num_given, taken, num_taken)
        if work is not None:
            work.wait()

    def _start(self, given: Tensor, num_given: list[int], taken: Tensor, num_taken: list[int]) -> dist.Work | None:
        if self._group is None:
            taken.copy_(given)
            return None
        work: dist.Work = dist.all_to_all_single(taken, given, num_taken, num_given, self._group, async_op=True)
        return work
