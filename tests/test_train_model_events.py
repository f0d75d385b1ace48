"""What happens next and when: intensities against closed forms of constant hazards.

In: intensities by hand. Out: a categorical over types, survival, times.
"""

import math

import pytest
import torch

from train.model.events_brainloom import NextEvent, intensities

HAZARD = torch.tensor([0.02, 0.06], dtype=torch.float64)  # events in a step, of two types
NUM_STEPS = 50


def constant() -> NextEvent:
    return NextEvent.of(HAZARD[None, :, None].expand(1, 2, NUM_STEPS))


def test_under_constant_hazards_the_time_is_exponential_and_the_type_its_share() -> None:
    following, total = constant(), float(HAZARD.sum())
    end = torch.arange(1, NUM_STEPS + 1, dtype=torch.float64)
    torch.testing.assert_close(following.survival[0], torch.exp(-total * end))
    within = 1 - math.exp(-total * NUM_STEPS)
    torch.testing.assert_close(following.of_type[0], within * HAZARD / total)
    torch.testing.assert_close(following.in_step[0], torch.exp(-total * (end - 1)) * (1 - math.exp(-total)))
    assert float(following.mean_steps) == pytest.approx(within / total)


def test_probabilities_are_whole_whatever_the_intensities() -> None:
    chance = torch.Generator().manual_seed(0)
    following = NextEvent.of(torch.rand(3, 4, 20, generator=chance, dtype=torch.float64).log().abs() * 0.1)
    total = following.of_type.sum(1) + following.survival[:, -1]
    torch.testing.assert_close(total, torch.ones(3, dtype=torch.float64))
    before = torch.cat([torch.ones(3, 1, dtype=torch.float64), following.survival[:, :-1]], 1)
    torch.testing.assert_close(following.in_step, before - following.survival)


def test_draws_of_the_process_agree() -> None:
    intensity = torch.tensor([[0.1, 0.5, 0.0, 0.3], [0.2, 0.0, 0.4, 0.1]], dtype=torch.float64)
    following = NextEvent.of(intensity[None])
    chance = torch.Generator().manual_seed(1)
    number = 200_000
    counts = torch.poisson(intensity.expand(number, 2, 4), generator=chance)
    within = torch.where(counts > 0, torch.rand(counts.shape, generator=chance) ** (1 / counts.clamp(min=1)), 0.0)
    time = torch.where(counts > 0, torch.arange(4) + 1 - within, torch.inf).amin(2)  # the first of c is the least of c
    first = time.amin(1)
    shares = [(time[:, type_] == first)[first.isfinite()].sum() / number for type_ in (0, 1)]
    assert [float(share) for share in shares] == pytest.approx(following.of_type[0].tolist(), abs=0.005)
    assert float(first.clamp(max=4).mean()) == pytest.approx(float(following.mean_steps), abs=0.01)


def test_no_hazard_leaves_nothing_to_happen() -> None:
    following = NextEvent.of(torch.zeros(1, 2, 5))
    assert not following.of_type.any() and following.survival.eq(1).all() and float(following.mean_steps) == 5


def test_intensities_are_in_order_of_time_and_of_the_types() -> None:
    predictions = torch.arange(12.0).reshape(1, 6, 2)
    source, start_s = torch.tensor([[3, 1, 3, 1, 0, 0]]), torch.tensor([[0.1, 0.0, 0.0, 0.1, 0.0, 0.1]])
    found = intensities(predictions, source, start_s, torch.tensor([1, 3]))
    assert found.tolist() == [[[2.0, 3.0, 6.0, 7.0], [4.0, 5.0, 0.0, 1.0]]]


@pytest.mark.parametrize("types", [[1, 3], []])
def test_types_that_are_not_asked_for_alike_are_refused(types: list[int]) -> None:
    source = torch.tensor([[3, 1, 3]])
    with pytest.raises(ValueError, match=r"Types of events are asked for .* bins each; what happens next"):
        intensities(torch.ones(1, 3, 5), source, torch.zeros(1, 3), torch.tensor(types, dtype=torch.int64))
