"""What a rank's model does with its own data: which modules it calls, and in which order gradients come.

In: this rank's first micro-batch of every turn. Out: lines of text, the same on every rank where every rank runs every
branch. No collective: the model is a thin copy of the run's, of the same classes and with as many layers.
"""

import torch
from torch import Tensor

from train.build import model_config
from train.config import Turn
from train.loader import TrainingSamples
from train.model.configuration_brainloom import BrainloomConfig
from train.model.modeling_brainloom import BrainloomForPreTraining
from train.sampler import positions

_CHANNELS = 4  # of a head of the thin model


def module_traces(samples: TrainingSamples, rank: int, world_size: int) -> dict[str, list[str]]:
    """The trace of each turn, by topic of the self-check."""
    run = samples.config
    first_step = {run.turn(step): step for step in reversed(range(len(run.train.families)))}
    with torch.random.fork_rng(devices=[]):
        model = BrainloomForPreTraining(_thin(model_config(run))).train()
        return {
            f"modules of {turn.mix}@{turn.context_s:g}": trace(model, _first(samples, step, rank, world_size), turn)
            for turn, step in first_step.items()
        }


def _thin(model: BrainloomConfig) -> BrainloomConfig:
    width = _CHANNELS * model.num_attention_heads
    thin = {"hidden_size": width, "intermediate_size": width, "unit_embed_size": width}
    return BrainloomConfig(**{**model.to_dict(), **thin})


def _first(samples: TrainingSamples, step: int, rank: int, world_size: int) -> dict[str, Tensor]:
    """The first micro-batch of a rank at a step; what is skipped for it is counted when it is trained on."""
    train = samples.config.train
    order = positions(step, step + 1, train.global_batch_size, train.micro_batch_size, rank, world_size)
    batch, _ = samples.batch(next(order))
    return batch


def trace(model: BrainloomForPreTraining, batch: dict[str, Tensor], turn: Turn) -> list[str]:
    """Modules in the order of their calls, then parameters in the order in which their gradients are ready."""
    lines: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, __, name=name: lines.append(f"calls {name or 'the model'}"))
        for name, module in model.named_modules()
    ]
    hooks += [
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: lines.append(f"has the gradient of {name}"))
        for name, parameter in model.named_parameters()
    ]
    try:
        rows = batch.pop("unit_rows")
        embeds = torch.zeros(*rows.shape, model.config.unit_embed_size, requires_grad=True)
        model(unit_embeds=embeds, context_s=turn.context_s, **batch).loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    return lines
