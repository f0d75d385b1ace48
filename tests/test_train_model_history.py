"""What a source did around each of its tokens, against sums by hand.

In: tokens with planted values. Out: sums of the right spans, of the token's own source alone, in any order.
"""

import math

import numpy as np
import pytest
import torch

from train.model.history_brainloom import NUM_SUMS, SPANS, own_history, spans


def by_hand(values: np.ndarray, source: np.ndarray, step: np.ndarray, token: int) -> list[float]:
    """Sums of the token's source over the steps of each span, compressed."""
    own, at, found = source == source[token], step[token], []
    for span in SPANS:
        for begin, stop in ((at + 1 - span, at + 1), (at, at + span), (at + 1 - span, at + span)):
            total = float(values[own & (step >= begin) & (step < stop)].sum())
            found.append(math.copysign(math.log1p(abs(total)), total))
    return found


def test_sums_are_of_the_tokens_own_source_and_of_the_right_spans() -> None:
    chance = np.random.default_rng(0)
    source, step = np.repeat(np.arange(3), 20), np.tile(np.arange(20), 3)
    order = chance.permutation(60)[:50]  # ten tokens are hidden, the others come in any order
    source, step = source[order], step[order]
    values = chance.integers(0, 4, (50, 5)).astype(np.float32)
    time_s = (step + 0.5) / 10
    inputs = (torch.from_numpy(x)[None] for x in (values, source, time_s.astype(np.float32)))
    history = own_history(*inputs, 3, 2.0)
    assert history.shape == (1, 50, NUM_SUMS)
    expected = [by_hand(values, source, step, token) for token in range(50)]
    torch.testing.assert_close(history[0], torch.tensor(expected), rtol=0, atol=1e-5)


def test_a_step_counts_once_in_what_lies_on_both_sides() -> None:
    total = torch.tensor([[[1.0, 10.0, 100.0, 1000.0]]])
    past, future, both = spans(total)[0, 0, 1, 3:6].tolist()  # two steps, at the second
    assert (past, future, both) == (11.0, 110.0, 111.0)


@pytest.mark.parametrize("context_s", [0.5, 1.0, 60.0])
def test_what_is_hidden_is_nothing_in_windows_of_any_length(context_s: float) -> None:
    values, source = torch.zeros(2, 4, 5), torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0]])
    time_s = torch.tensor([[0.05, 0.05, context_s - 0.05, 0.0], [0.0] * 4])
    assert not own_history(values, source, time_s, 2, context_s).any()
