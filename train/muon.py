"""Muon: matrices move by the orthogonal part of their momentum, everything else by AdamW.

In: flat buffers of ZeRO, with their gradients. Out: buffers that have moved by one step.
Every direction of a matrix then moves alike, rare ones too (Jordan 2024), by as much as AdamW would move it (Liu 2025),
so that learning rate and decay are AdamW's. A matrix is orthogonalised whole: of what ZeRO has cut, ranks add up their
pieces first, one matrix at a time. It works on what DeepSpeed has already averaged, checked and clipped.
"""

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


def matrices_of(partitions: Partitions) -> list[list[Matrix]]:
    """The matrices of each buffer, of all ranks, in one order; all ranks call it."""
    mine = [{piece.name: piece for piece in pieces} for pieces in partitions.pieces]
    everybody = [mine] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    found = []
    for number, pieces in enumerate(mine):
        holders = [name for other in everybody for name in other[number]]
        names = [name for name in dict.fromkeys(holders) if is_matrix(name, partitions.shapes[name])]
        found.append(
            [
                Matrix((rows, columns), pieces.get(name), holders.count(name) > 1)
                for name in names
                for rows, columns in [partitions.shapes[name]]
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
        for matrix in self._matrices.get(flat, []):  # DeepSpeed takes a step of zeros before anything is known
            self._move_one(flat, update, matrix, lr)

    def _move_one(self, flat: Tensor, update: Tensor, matrix: Matrix, lr: float) -> None:
        piece, (rows, columns) = matrix.piece, matrix.shape
        if piece is None and not matrix.is_cut:
            return
        whole = update.new_zeros(rows * columns)
        if piece is not None:
            whole[piece.start : piece.start + piece.size] = update[piece.place : piece.place + piece.size]
        if matrix.is_cut:
            dist.all_reduce(whole)
        if piece is not None:
            moved = orthogonal(whole.view(rows, columns)).reshape(-1)[piece.start : piece.start + piece.size]
            flat[piece.place : piece.place + piece.size].add_(moved, alpha=-lr * RMS * max(rows, columns) ** 0.5)
