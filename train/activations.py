"""What a forward and backward pass holds beside the weights, counted on tensors that have shapes and no memory.

In: a model's configuration and the shape of a micro-batch. Out: bytes of what comes in, of what autograd keeps, and of
the most that is alive at once.

The model really runs, forward and backward, on torch's fake tensors, and every storage is counted from its creation to
its end: nothing is assumed of what an operation saves, and a change of the model is in the numbers at once. Not seen is
what kernels allocate inside (scratch of matrix products and of attention), and what torch.compile fuses away.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train.build import HALVED
from train.flops import Shape
from train.model.attention_brainloom import BrainloomRMSNorm
from train.model.configuration_brainloom import BrainloomConfig
from train.model.modeling_brainloom import BrainloomForPreTraining

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Passes:
    """Bytes of one micro-batch.

    Attributes:
        rows: how many rows of the unit table it uses, at most.
        inputs: what comes in, without these rows.
        kept: alive at the end of the forward pass, beside the inputs.
        most: alive at the worst moment of both passes, beside the inputs; one gradient of a parameter may be in it.
    """

    rows: int
    inputs: int
    kept: int
    most: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are made while it is on, until they are gone."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        """`known`: tensors that were there before, and do not count."""
        super().__init__()
        self.now, self.most = 0, 0
        self._sizes: dict[int, int] = {}
        for tensor in known:
            self._watch(tensor, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and watch what it made."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._sizes:
                self._watch(tensor, tensor.untyped_storage().nbytes())
        self.most = max(self.most, self.now)
        return made

    def _watch(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        self._sizes[storage._cdata] = size
        self.now += size
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, number: int) -> None:
        self.now -= self._sizes.pop(number)


class _FusedNorm(torch.autograd.Function):
    """What CUDA's RMS norm holds: its input, and one number for each row; on a CPU it is made of many operations."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(weight), torch.empty_like(x)


def _as_on_cuda(model: BrainloomForPreTraining) -> None:
    """Put the norm of CUDA in the place of the CPU's; attention keeps the same on both."""
    for module in model.modules():
        if isinstance(module, BrainloomRMSNorm):
            fused = partial(_FusedNorm.apply, module.weight)
            module.forward = fused  # type: ignore[method-assign]  # of this model alone


def arguments(config: BrainloomConfig, shape: Shape) -> dict[str, Tensor]:
    """A batch of zeros as the engine hands it to the model, on the device of the context."""
    samples = config.samples_per_token
    sizes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "unit_embeds": (torch.float32, (shape.sources, config.unit_embed_size)),
        "unit_features": (torch.float32, (shape.sources, config.num_unit_features)),
        "source_modality": (torch.int64, (shape.sources,)),
        "source_null": (torch.float32, (shape.sources,)),
        "input_values": (torch.float32, (shape.tokens, samples)),
        "input_observed": (torch.bool, (shape.tokens, samples)),
        "input_source": (torch.int64, (shape.tokens,)),
        "input_time_s": (torch.float32, (shape.tokens,)),
        "input_start_s": (torch.float32, (shape.tokens,)),
        "input_sample_s": (torch.float32, (shape.tokens,)),
        "input_mask": (torch.bool, (shape.tokens,)),
        "pixels": (torch.float32, (shape.frames, *config.image_size)),
        "frame_time_s": (torch.float32, (shape.frames,)),
        "frame_mask": (torch.bool, (shape.frames,)),
        "query_source": (torch.int64, (shape.queries,)),
        "query_time_s": (torch.float32, (shape.queries,)),
        "query_sample_s": (torch.float32, (shape.queries,)),
        "labels": (torch.float32, (shape.queries, samples)),
        "label_mask": (torch.bool, (shape.queries, samples)),
    }
    if shape.folds:
        sizes["source_fold"] = (torch.int64, (shape.sources,))
    made = {name: torch.zeros(shape.batch, *size, dtype=kind) for name, (kind, size) in sizes.items()}
    made["unit_embeds"].requires_grad_()
    return made


def _halved(inputs: dict[str, Tensor], precision: str) -> dict[str, Tensor]:
    """As the engine does it."""
    return {name: x.to(DTYPES[precision]) if name in HALVED else x for name, x in inputs.items()}


def trace(
    config: BrainloomConfig, shape: Shape, precision: str, checkpointing: bool = False, on_cuda: bool = True
) -> Passes:
    """Count a micro-batch; `checkpointing`: activations of blocks are computed again instead of kept."""
    with FakeTensorMode():
        model = BrainloomForPreTraining._from_config(config, dtype=DTYPES[precision]).train()
        if on_cuda:
            _as_on_cuda(model)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        inputs = arguments(config, shape)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_hand_over)
        with LiveBytes([*model.parameters(), *inputs.values()]) as live:
            output = model(**_halved(inputs, precision), context_s=shape.context_s)
            kept = live.now
            output.loss.backward()
        rows = inputs.pop("unit_embeds")
    num_rows = shape.batch * shape.sources
    return Passes(num_rows, sum(x.nbytes for x in inputs.values()), kept + rows.nbytes, live.most + rows.nbytes)


def _hand_over(parameter: Tensor) -> None:
    """ZeRO takes a gradient as soon as it is there."""
    parameter.grad = None
