"""Muon: matrices move by the orthogonal part of their momentum, everything else by AdamW.

In: flat buffers of ZeRO, with their gradients. Out: buffers that have moved by one step.
Every direction of a matrix then moves alike, rare ones too (Jordan 2024), by as much as AdamW would move it (Liu 2025),
so that learning rate and decay are AdamW's. A matrix is orthogonalised whole: those that ZeRO has cut are dealt to the
ranks, as many at a time as there are ranks, more where they are small. It works on what DeepSpeed has already
averaged, checked and clipped.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.partitions import Partitions, Piece

MATRICES = "matrices"  # the name of the group of parameters that move by their orthogonal part
SMALLEST_SIDE = 32  # of such a matrix: a thinner one is a few vectors
MOMENTUM = 0.95
NUM_ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration whose slope at zero is steep (Jordan 2024)
ROUND_SIZE = 1 << 20  # numbers of small matrices that are under way at once
RMS = 0.2  # of AdamW's updates, which these are scaled to (Liu 2025, section 2.2)


def is_matrix(name: str, shape: Iterable[int]) -> bool:
    """Does a parameter move by its orthogonal part?"""
    sizes = tuple(shape)
    return len(sizes) == 2 and min(sizes) >= SMALLEST_SIDE and not name.endswith("_embed")


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of a matrix U S V^T, of the same shape: its singular values end up between .7 and 1.2.

    By Newton-Schulz iterations, in float32 on a CPU and in bfloat16 on a GPU. A matrix of zeros stays one.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(NUM_ITERATIONS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.T if is_tall else x).to(matrix.dtype)


@dataclass(frozen=True)
class Matrix:
    """One of a buffer's matrices: its shape, the piece of it that is held here, and whether others hold some of it."""

    shape: tuple[int, int]
    piece: Piece | None
    is_cut: bool

    def whole(self, flat: Tensor) -> Tensor:
        """What a buffer holds of it, among zeros."""
        found = flat.new_zeros(math.prod(self.shape))
        if self.piece is not None:
            found[self._inside()] = flat[self._place()]
        return found.view(self.shape)

    def add_to(self, flat: Tensor, direction: Tensor, lr: float) -> None:
        """Take a step in a buffer, by the part of a direction that is held there."""
        if self.piece is not None:
            flat[self._place()].add_(direction.reshape(-1)[self._inside()], alpha=-lr * RMS * max(self.shape) ** 0.5)

    def _inside(self) -> slice:
        assert self.piece is not None
        return slice(self.piece.start, self.piece.start + self.piece.size)

    def _place(self) -> slice:
        assert self.piece is not None
        return slice(self.piece.place, self.piece.place + self.piece.size)


def matrices_of(partitions: Partitions) -> list[list[Matrix]]:
    """The matrices of each buffer: its own, and in one order all that are cut; all ranks call it."""
    mine = [{piece.name: piece for piece in pieces} for pieces in partitions.pieces]
    everybody = [mine] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    found = []
    for number, pieces in enumerate(mine):
        holders = [name for other in everybody for name in other[number]]
        names = [name for name in dict.fromkeys(holders) if is_matrix(name, partitions.shapes[name])]
        names.sort(key=lambda name: math.prod(partitions.shapes[name]))  # those of one size are dealt together
        found.append(
            [
                Matrix((rows, columns), pieces.get(name), holders.count(name) > 1)
                for name in names
                for rows, columns in [partitions.shapes[name]]
                if name in pieces or holders.count(name) > 1
            ]
        )
    return found


class Muon(torch.optim.AdamW):
    """AdamW whose group `matrices` moves otherwise.

    Its state has the same names, so that a checkpoint has one form: `exp_avg` is the momentum, `exp_avg_sq` stays zero.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, betas=betas)
        self._matrices: dict[Tensor, list[Matrix]] = {}

    def follow(self, partitions: Partitions) -> None:
        """Learn what lies where, before the first step; all ranks call it."""
        self._matrices = dict(zip(partitions.masters(), matrices_of(partitions), strict=True))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # a closure would have to be run whole
        """One step of the groups that DeepSpeed has put in place; all ranks take it."""
        groups = self.param_groups
        for group in groups:
            if group["name"] == MATRICES:
                for flat in group["params"]:
                    self._move(flat, group["lr"], group["weight_decay"])
        self.param_groups = [group for group in groups if group["name"] != MATRICES and group["params"]]
        if self.param_groups:
            super().step()
        self.param_groups = groups

    def _move(self, flat: Tensor, lr: float, weight_decay: float) -> None:
        assert flat.grad is not None
        state = self.state[flat]
        if not state:
            state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(flat), exp_avg_sq=torch.zeros_like(flat))
        state["step"] += 1
        state["exp_avg"].lerp_(flat.grad, 1 - MOMENTUM)
        update = flat.grad.lerp(state["exp_avg"], MOMENTUM)  # Nesterov's
        flat.mul_(1 - lr * weight_decay)
        matrices = self._matrices[flat]
        for matrix in matrices:
            if not matrix.is_cut:
                matrix.add_to(flat, orthogonal(matrix.whole(update)), lr)
        cut = [matrix for matrix in matrices if matrix.is_cut]
        num_ranks = dist.get_world_size() if cut else 1
        for together in rounds([math.prod(matrix.shape) for matrix in cut], num_ranks):
            dealt = [own for rank in range(num_ranks) if (own := cut[together][rank::num_ranks])]
            shapes = [[matrix.shape for matrix in own] for own in dealt]
            wholes = [torch.cat([matrix.whole(update).view(-1) for matrix in own]) for own in dealt]
            orthogonal_by_turns(wholes, shapes)
            for own, directions in zip(dealt, map(split, wholes, shapes), strict=True):
                for matrix, direction in zip(own, directions, strict=True):
                    matrix.add_to(flat, direction, lr)


def rounds(sizes: list[int], num_ranks: int) -> list[slice]:
    """Which matrices are under way at once: as many as there are ranks, more where they are small."""
    found, first = [], 0
    while first < len(sizes):
        stop = first + num_ranks
        while stop < len(sizes) and sum(sizes[first : stop + 1]) <= ROUND_SIZE:
            stop += 1
        found.append(slice(first, stop))
        first = stop
    return found


def split(flat: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    """The matrices that lie in a buffer one after another."""
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def orthogonal_by_turns(wholes: list[Tensor], shapes: list[list[tuple[int, int]]]) -> None:
    """Make matrices orthogonal of which each rank has pieces, among zeros: the i-th buffer's are the i-th rank's task.

    It hands round what it has made of them.
    """
    for work in [dist.reduce(whole, owner, async_op=True) for owner, whole in enumerate(wholes)]:
        work.wait()
    if (rank := dist.get_rank()) < len(wholes):
        for matrix in split(wholes[rank], shapes[rank]):
            matrix.copy_(orthogonal(matrix))
    for work in [dist.broadcast(whole, owner, async_op=True) for owner, whole in enumerate(wholes)]:
        work.wait()
