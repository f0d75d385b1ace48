"""The model, compiled: as one graph, or the inside of its blocks.

In: a model. Out: the same model, which torch.compile turns into kernels; how often it gave up or began again.
"""

import inspect
from typing import TypeVar

import torch
from torch import nn
from torch._dynamo.utils import counters, get_compilation_metrics

from train.model.modeling_brainloom import BrainloomForPreTraining

Module = TypeVar("Module", bound=nn.Module)
MOST_SHAPES = 100  # those of all families and lengths; torch leaves what is beyond its 8 uncompiled


def compile_whole(model: BrainloomForPreTraining) -> None:
    """Compile all of it, one graph for each family and length of windows; there must be no hook in it."""
    model.__class__ = _compiled(type(model))


def compile_blocks(model: BrainloomForPreTraining) -> None:
    """Compile the inside of each block, which must have no hook of ZeRO's in it."""
    blocks = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    kinds = {kind: _compiled(kind) for kind in {type(block) for block in blocks}}
    for block in blocks:
        block.__class__ = kinds[type(block)]


def _compiled(kind: type[Module]) -> type[Module]:
    """The same module with a compiled `forward`; its checkpointing, which transformers puts around, stays around."""
    torch._dynamo.config.recompile_limit = MOST_SHAPES
    forward = torch.compile(inspect.unwrap(kind.forward), dynamic=False)  # each family of tasks has its own shapes
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def summary() -> str:
    """What this process has compiled so far, in a line."""
    graphs = [graph for graph in get_compilation_metrics() if graph.co_name]
    again = sum(graph.recompile_reason is not None for graph in graphs)
    seconds = sum(graph.entire_frame_compile_time_s or 0.0 for graph in graphs)
    breaks: dict[str, int] = counters["graph_break"]
    why = "".join(f"\n  {number} x {reason.splitlines()[0]}" for reason, number in breaks.items())
    return (
        f"compiled {len(graphs)} graphs in {seconds:.0f} s, {again} of them again for other shapes; "
        f"{sum(breaks.values())} graph breaks{why}"
    )
