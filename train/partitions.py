"""What this rank owns of the parameters: pieces of flat buffers of master weights and moments, under every ZeRO stage.

In: a DeepSpeed engine. Out: each piece by its parameter's name and place in it, to be read and set.

ZeRO flattens parameters and cuts them among the ranks: stage 3 each for itself, stages 1 and 2 a group as a whole.
Either way a rank's piece of a parameter is a stretch of it, so that what was written under one stage and number of
ranks, any other can read.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + size) of a flattened parameter are [place, place + size) of a flat buffer."""

    name: str
    start: int
    size: int
    place: int


class Partitions:
    """The flat buffers of this rank; `pieces[i]` says what lies in the i-th."""

    def __init__(self, engine: Any) -> None:
        self._optimizer, self._inner = engine.optimizer, engine.optimizer.optimizer
        self._names = {parameter: name for name, parameter in engine.module.named_parameters()}
        self._is_stage3 = engine.zero_optimization_stage() == 3
        self.pieces = list(self._of_stage3() if self._is_stage3 else self._of_stage1_or_2())
        self.shapes = {n: list(getattr(p, "ds_shape", p.shape)) for n, p in engine.module.named_parameters()}

    def _of_stage3(self) -> Iterator[list[Piece]]:
        for group in self._optimizer.fp16_groups:
            pieces, place = [], 0
            for parameter in group:
                padded = parameter.partition_numel()
                start = dist.get_rank() * padded
                pieces.append(Piece(self._names[parameter], start, min(padded, parameter.ds_numel - start), place))
                place += padded
            yield [piece for piece in pieces if piece.size > 0]

    def _of_stage1_or_2(self) -> Iterator[list[Piece]]:
        for group in self._optimizer.bit16_groups:
            pairs = [(parameter, parameter._hp_mapping) for parameter in group]
            yield [
                Piece(
                    self._names[parameter],
                    found.lp_fragment_address.start,
                    found.lp_fragment_address.numel,
                    found.hp_fragment_address.start,
                )
                for parameter, found in pairs
                if found is not None
            ]

    def masters(self) -> list[Tensor]:
        """The flat buffers of master weights, by which an optimizer knows them."""
        optimizer = self._optimizer
        found: list[Tensor] = (
            optimizer.fp32_partitioned_groups_flat if self._is_stage3 else optimizer.single_partition_of_fp32_groups
        )
        return found

    @contextlib.contextmanager
    def _in_memory(self, number: int, is_changed: bool) -> Iterator[Tensor]:
        """A buffer of master weights; where it lives on NVMe, it is fetched, and sent back if it was changed."""
        master = self.masters()[number]
        is_swapped = self._is_stage3 and self._optimizer._swappable_optimizer_subgroup(number)
        if is_swapped:
            self._optimizer._optimizer_states_and_gradient_swap_in(number)
        yield master
        if is_swapped and is_changed:
            self._optimizer._optimizer_states_and_gradient_swap_out(number)
        elif is_swapped:
            self._optimizer._release_swap_buffers(number)

    def buffers(self) -> Iterator[dict[str, Tensor]]:
        """Each buffer by kind, fp32, in the order of `pieces`; not to be kept. Before the first step moments are 0."""
        for number in range(len(self.pieces)):
            with self._in_memory(number, is_changed=False) as master, torch.no_grad():
                state = self._inner.state.get(master) or {kind: torch.zeros_like(master) for kind in MOMENTS}
                yield {MASTER: master.detach(), **{kind: state[kind] for kind in MOMENTS}}

    @property
    def num_steps(self) -> int:
        """Adam's count of its steps; the buffers move together, so that there is one number."""
        counts = {int(self._inner.state.get(master, {}).get("step", 0)) for master in self.masters()}
        assert len(counts) == 1, f"buffers disagree on the number of steps: {counts}"
        return counts.pop()

    def refill(self, num_steps: int) -> Iterator[dict[str, Tensor]]:
        """Each buffer by kind, of zeros, to be filled while it is the turn; then the model computes with it."""
        for number in range(len(self.pieces)):
            with self._in_memory(number, is_changed=True) as master, torch.no_grad():
                moments = {kind: torch.zeros_like(master.data) for kind in MOMENTS}  # Adam makes them at its first step
                self._inner.state[master] = {"step": torch.tensor(float(num_steps)), **moments}
                yield {MASTER: master.data.zero_(), **moments}
                if self._is_stage3:  # the working copies follow their masters
                    self._optimizer._reassign_or_swap_out_partitioned_parameters(number)
        self._publish()

    def _publish(self) -> None:
        if not self._is_stage3:
            self._optimizer.update_lp_params()
            return
        persistent = self._optimizer.persistent_parameters
        if persistent:  # small parameters stay gathered: refresh them from their partitions
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
        self._optimizer.invalidate_secondary_tensor()  # what a node keeps of the weights under hpZ
