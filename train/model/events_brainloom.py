"""What happens next, and when: from the intensities of every type of event.

In: intensities, events in a step, constant within it. Out: the probability that the next event is of each type
(a categorical), and when it comes (time to event).

The hazard of the next event is the sum of all intensities, and given that one happens it is of type i with the
probability of its share (competing risks; Prentice 1978; Daley & Vere-Jones 2003, chapter 7). Intensities say what is
expected given what the model sees; what comes after the next event is not conditioned on it.

Shapes: B batch, T types, G steps, Q queries, P samples per token, K tokens of each type.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NextEvent:
    """The first event from the first step on.

    Attributes:
        of_type_in_step: probability that it is of a type and falls into a step (B, T, G).
        survival: probability that it has not come by the end of a step (B, G).
        mean_steps: expected number of steps until it comes, or until the last step ends (B,).
    """

    of_type_in_step: Tensor
    survival: Tensor
    mean_steps: Tensor

    @classmethod
    def of(cls, intensity_BTG: Tensor) -> "NextEvent":
        """Of intensities, not negative."""
        hazard_BG = intensity_BTG.sum(1)
        past_BG = hazard_BG.cumsum(-1)
        begun_BG = torch.exp(hazard_BG - past_BG)  # nothing has come before the step
        mean_share_BG = _mean_survival(hazard_BG)
        in_step_BTG = begun_BG[:, None] * intensity_BTG * mean_share_BG[:, None]
        return cls(in_step_BTG, torch.exp(-past_BG), (begun_BG * mean_share_BG).sum(-1))

    @property
    def of_type(self) -> Tensor:
        """Probability that the next event is of a type and comes within the steps (B, T)."""
        return self.of_type_in_step.sum(-1)

    @property
    def in_step(self) -> Tensor:
        """Probability that the next event, of whatever type, falls into a step (B, G)."""
        return self.of_type_in_step.sum(1)


def _mean_survival(hazard: Tensor) -> Tensor:
    """(1 - exp(-h)) / h: the share of a step in which nothing has come, given that nothing had before it."""
    safe = torch.where(hazard > 0, hazard, 1.0)
    return torch.where(hazard > 0, -torch.expm1(-safe) / safe, 1.0)


def intensities(predictions_BQP: Tensor, source_BQ: Tensor, start_s_BQ: Tensor, types_T: Tensor) -> Tensor:
    """Intensities (B, T, G), G = K P in order of time, from expected counts of queries in any order.

    `types_T` are the sources that are events. Raises ValueError unless each is asked for the same K tokens.
    """
    found = [_in_order(predictions_BQP, source_BQ == source, start_s_BQ) for source in types_T]
    sizes = sorted({counts.shape[1] for counts in found})
    if len(sizes) != 1:
        raise ValueError(
            f"Types of events are asked for {sizes or 'no'} bins each; what happens next needs as many for all. "
            "Set `asked` of every stream of events at the same times."
        )
    return torch.stack(found, 1)


def _in_order(predictions_BQP: Tensor, is_own_BQ: Tensor, start_s_BQ: Tensor) -> Tensor:
    """What is said of one source (B, K P)."""
    rows = [
        predictions[own][start_s[own].argsort()].flatten()
        for predictions, own, start_s in zip(predictions_BQP, is_own_BQ, start_s_BQ, strict=True)
    ]
    return torch.stack(rows)
