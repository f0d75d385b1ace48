"""The unit table: Adam on the rows that were used, and only on them; rows follow their keys.

In: rows of made-up batches. Out: the same numbers as a dense embedding under torch's own Adam.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from train.unit_table import BETAS, EPS, UnitTable, initial_row

CPU = torch.device("cpu")
KEYS = [f"d/s/{i}" for i in range(6)]


def used(table: UnitTable, rows: Tensor, weight: float = 1.0, lr: float = 0.1) -> None:
    """One step on `rows`, whose gradient is `weight` everywhere."""
    (table.lookup(rows).sum() * weight).backward()
    table.step(lr)


def objective(embeds: Tensor, step: int) -> Tensor:
    target = torch.sin(torch.arange(embeds.numel(), dtype=torch.float32) + step).view_as(embeds)
    return ((embeds - target) ** 2 * (1 + step % 3)).sum()


def test_with_every_row_in_every_step_it_is_a_dense_embedding_under_adam() -> None:
    table, dense = UnitTable(KEYS, 4, CPU), nn.Embedding(6, 4)
    dense.weight.data.copy_(table.weight)
    optimizer = torch.optim.Adam(dense.parameters(), lr=0.05, betas=BETAS, eps=EPS)
    rows = torch.tensor([[0, 1, 2], [3, 4, 5]])
    for step in range(20):
        optimizer.zero_grad()
        objective(dense(rows), step).backward()
        optimizer.step()
        objective(table.lookup(rows), step).backward()
        table.step(0.05)
    assert (table.weight - dense.weight).abs().max() < 1e-6
    assert table.num_updates.tolist() == [20] * 6


def test_a_row_that_was_not_used_does_not_move_and_its_count_stays() -> None:
    table = UnitTable(KEYS, 4, CPU)
    used(table, torch.tensor([[1, 4]]))
    before = {name: tensor.clone() for name, tensor in table.state().items()}
    used(table, torch.tensor([[1]]))
    for name, tensor in table.state().items():
        assert torch.equal(tensor[[0, 2, 3, 4, 5]], before[name][[0, 2, 3, 4, 5]])
        assert not torch.equal(tensor[1], before[name][1])
    assert table.num_updates.tolist() == [0, 2, 0, 0, 1, 0]


def test_each_row_is_corrected_by_its_own_number_of_updates() -> None:
    early, late = UnitTable(KEYS, 4, CPU), UnitTable(KEYS, 4, CPU)
    for _ in range(5):
        used(late, torch.tensor([[0]]))
    for table in (early, late):
        used(table, torch.tensor([[2]]), weight=3.0)
    assert torch.equal(early.weight[2], late.weight[2])


def test_the_average_of_a_row_moves_when_the_row_does() -> None:
    table = UnitTable(KEYS, 4, CPU, averages=True)
    start = table.weight.clone()
    expected = start.clone()
    for _ in range(3):
        (table.lookup(torch.tensor([[1]])).sum()).backward()
        table.step(0.1, keep=0.5)
        expected[1] = 0.5 * expected[1] + 0.5 * table.weight[1]
    assert table.average is not None and torch.allclose(table.average, expected)
    assert torch.equal(table.average[[0, 2, 3, 4, 5]], start[[0, 2, 3, 4, 5]])


def test_row_minus_one_is_zeros_and_has_no_gradient() -> None:
    table = UnitTable(KEYS, 4, CPU)
    before = table.weight.clone()
    embeds = table.lookup(torch.tensor([[-1, 2, -1]]))
    assert not embeds[0, [0, 2]].any() and torch.equal(embeds[0, 1], before[2])
    embeds.sum().backward()
    table.step(0.1)
    assert [row for row in range(6) if not torch.equal(table.weight[row], before[row])] == [2]


def test_duplicates_and_lookups_of_one_step_add_up() -> None:
    apart, together = UnitTable(KEYS, 4, CPU), UnitTable(KEYS, 4, CPU)
    (apart.lookup(torch.tensor([[1, 1], [1, 2]])).sum() * 2).backward()
    apart.accumulate()
    apart.lookup(torch.tensor([[1]])).sum().backward()
    apart.accumulate()
    rows = together.lookup(torch.tensor([[1, 2]]))
    (rows[0, 0].sum() * 7 + rows[0, 1].sum() * 2).backward()
    for table in (apart, together):
        table.step(0.1)
    assert all(torch.equal(apart.state()[name], together.state()[name]) for name in apart.state())


def test_a_lookup_without_a_backward_moves_nothing() -> None:
    table = UnitTable(KEYS, 4, CPU)
    before = table.weight.clone()
    table.lookup(torch.tensor([[1, 2]]))
    table.step(0.1)
    assert torch.equal(table.weight, before) and not table.num_updates.any()


def test_a_discarded_step_leaves_no_gradient() -> None:
    table = UnitTable(KEYS, 4, CPU)
    before = table.weight.clone()
    table.lookup(torch.tensor([[1]])).sum().backward()
    table.accumulate()
    table.discard()
    table.step(0.1)
    assert torch.equal(table.weight, before)


def test_a_new_row_is_drawn_from_its_key_alone() -> None:
    table = UnitTable(["b", "a"], 8, CPU)
    assert torch.equal(table.weight[1], initial_row("a", 8)) and not torch.equal(table.weight[0], table.weight[1])
    assert len(UnitTable([], 8, CPU).weight) == 0


@pytest.mark.parametrize(
    "choose", [lambda keys: keys[::-1], lambda keys: keys[1:4], lambda keys: ["x/y/0", *keys, "x/y/1"]]
)
def test_rows_follow_their_keys_into_another_table(choose: Callable[[list[str]], list[str]]) -> None:
    trained = UnitTable(KEYS, 4, CPU)
    for row in (0, 2, 2, 3):
        used(trained, torch.tensor([[row]]))
    other = UnitTable(choose(KEYS), 4, CPU)
    fresh = {name: tensor.clone() for name, tensor in other.state().items()}
    assert other.load(trained.state(), trained.keys) == len(set(other.keys) & set(KEYS))
    for row, key in enumerate(other.keys):
        for name, tensor in other.state().items():
            expected = trained.state()[name][KEYS.index(key)] if key in KEYS else fresh[name][row]
            assert torch.equal(tensor[row], expected)


def test_a_table_of_strangers_takes_nothing_over() -> None:
    assert UnitTable(["x"], 4, CPU).load(UnitTable(KEYS, 4, CPU).state(), KEYS) == 0
