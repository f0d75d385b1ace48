"""What changes from step to step: the learning rate, and what the running average keeps.

In: a step and a run's configuration. Out: numbers that depend on the step alone, so that a resumed run has them too.
"""

import math

from train.config import OptimConfig


def lr_factor(step: int, config: OptimConfig) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then the configured schedule."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    shape = {"cosine": _cosine, "wsd": _stable_then_decay}[config.schedule](step, config)
    return config.final_lr_fraction + (1 - config.final_lr_fraction) * shape


def _cosine(step: int, config: OptimConfig) -> float:
    """Half a cosine from the end of the warm-up to the last step (Loshchilov & Hutter 2017)."""
    progress = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _stable_then_decay(step: int, config: OptimConfig) -> float:
    """1, and over the last `decay_steps` 1 - sqrt(progress) (WSD: Hu et al. 2024; its decay: Hägele et al. 2024)."""
    progress = (step - config.num_steps + config.decay_steps) / max(1, config.decay_steps)
    return 1 - math.sqrt(min(1.0, max(0.0, progress)))


def average_decay(step: int, config: OptimConfig) -> float:
    """What the running average keeps at a step: little at the start, 1 - 1 / average_steps in the long run."""
    return min(1 - 1 / config.average_steps, (1 + step) / (10 + step))
