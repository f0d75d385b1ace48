"""The unit table: Adam on the rows that were used, and only on them; rows follow their keys.

In: rows of made-up batches. Out: the same numbers as a dense embedding under torch's own Adam.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train.unit_table import BETAS, EPS, UnitTable, initial_rows, owner_of

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
    assert table.state()["num_updates"].tolist() == [20] * 6


def test_a_row_that_was_not_used_does_not_move_and_its_count_stays() -> None:
    table = UnitTable(KEYS, 4, CPU)
    used(table, torch.tensor([[1, 4]]))
    before = {name: tensor.clone() for name, tensor in table.state().items()}
    table.lookup(torch.tensor([[1]])).sum().backward()
    table.step(0.1, number=7)
    for name, tensor in table.state().items():
        assert torch.equal(tensor[[0, 2, 3, 4, 5]], before[name][[0, 2, 3, 4, 5]])
        assert not torch.equal(tensor[1], before[name][1])
    assert table.state()["num_updates"].tolist() == [0, 2, 0, 0, 1, 0]
    assert table.state()["moved_at"].tolist() == [0, 7, 0, 0, 1, 0]


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
    average = table.state()["average"]
    assert torch.allclose(average, expected)
    assert torch.equal(average[[0, 2, 3, 4, 5]], start[[0, 2, 3, 4, 5]])


def test_row_minus_one_is_zeros_and_has_no_gradient() -> None:
    table = UnitTable(KEYS, 4, CPU)
    before = table.weight.clone()
    embeds = table.lookup(torch.tensor([[-1, 2, -1]]))
    assert not embeds[0, [0, 2]].any() and torch.equal(embeds[0, 1], before[2])
    embeds.sum().backward()
    table.step(0.1)
    assert [row for row in range(6) if not torch.equal(table.weight[row], before[row])] == [2]


def test_duplicates_and_lookups_of_one_step_add_up() -> None:
    apart, ahead, together = (UnitTable(KEYS, 4, CPU) for _ in range(3))
    batches = torch.tensor([[1, 1], [1, 2]]), torch.tensor([[1]])
    ahead.fetch(*batches)
    for table in (apart, ahead):
        (table.lookup(batches[0]).sum() * 2).backward()
        table.lookup(batches[1]).sum().backward()
    rows = together.lookup(torch.tensor([[1, 2]]))
    (rows[0, 0].sum() * 7 + rows[0, 1].sum() * 2).backward()
    for table in (apart, ahead, together):
        table.step(0.1)
    for table in (apart, ahead):
        assert all(torch.equal(table.state()[name], together.state()[name]) for name in table.state())


def test_a_lookup_without_a_backward_moves_nothing() -> None:
    table = UnitTable(KEYS, 4, CPU)
    before = table.weight.clone()
    table.lookup(torch.tensor([[1, 2]]))
    table.step(0.1)
    assert torch.equal(table.weight, before) and not table.state()["num_updates"].any()


def test_what_is_looked_up_without_gradients_is_not_kept() -> None:
    table = UnitTable(KEYS, 4, CPU)
    with torch.no_grad():
        embeds = table.lookup(torch.tensor([[1, 2]]))
    assert torch.equal(embeds[0], table.weight[1:3]) and not embeds.requires_grad
    table.grow(["d/t/0"])  # no step is under way


@pytest.mark.parametrize("begin_another", [False, True])
def test_a_step_that_is_skipped_leaves_no_gradient(begin_another: bool) -> None:
    table = UnitTable(KEYS, 4, CPU)
    before = table.weight.clone()
    table.fetch(torch.tensor([[1]]))
    table.lookup(torch.tensor([[1]])).sum().backward()
    table.exchange()
    if begin_another:
        table.fetch(torch.tensor([[2]]))
    else:
        table.discard()
    assert torch.equal(table.lookup(torch.tensor([[2]]))[0], before[2:3]), "what was fetched is forgotten as well"
    table.step(0.1)
    assert torch.equal(table.weight, before)


def test_the_norm_is_of_the_whole_gradient_and_a_scale_applies_to_it() -> None:
    table, scaled = UnitTable(KEYS, 4, CPU), UnitTable(KEYS, 4, CPU)
    for each, weight in ((table, 3.0), (scaled, 6.0)):
        (each.lookup(torch.tensor([[1], [5]])).sum() * weight).backward()
        each.exchange()
    assert float(table.norm) == pytest.approx((8 * 9) ** 0.5)
    table.step(0.1)
    scaled.step(0.1, scale=0.5)
    assert all(torch.equal(table.state()[name], scaled.state()[name]) for name in table.state())


def test_a_new_row_is_drawn_from_its_key_alone() -> None:
    table = UnitTable(["b", "a"], 8, CPU)
    assert torch.equal(table.weight[1:], initial_rows(["a"], 8)) and not torch.equal(table.weight[0], table.weight[1])
    assert len(UnitTable([], 8, CPU).weight) == 0


def test_rows_are_those_that_a_generator_for_each_key_draws() -> None:
    keys = [f"d/s/{i}" for i in range(300)]  # enough for the rare branches of the normal distribution
    digests = [np.frombuffer(hashlib.sha256(key.encode()).digest()[:16], np.uint64) for key in keys]
    each = [np.random.Generator(np.random.Philox(key=digest)).standard_normal(7, np.float32) for digest in digests]
    assert np.array_equal(initial_rows(keys, 7).numpy(), np.stack(each))


def test_the_owner_of_a_key_never_changes() -> None:
    """Frozen: another hash would send every row of every running job elsewhere."""
    assert [owner_of(key, 64) for key in ("d/s/0", "d/s/1", "dataset/session/unit")] == [45, 47, 2]


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made while it is active."""

    def __init__(self, but: list[Tensor]) -> None:
        super().__init__()
        self.but, self.num_elements = {tensor.data_ptr() for tensor in but}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.data_ptr() not in self.but]
        self.num_elements = max([self.num_elements, *(tensor.numel() for tensor in made)])
        return result


def test_the_cost_of_a_step_does_not_grow_with_the_table() -> None:
    table = UnitTable([f"d/s/{i}" for i in range(1000)], 4, CPU, averages=True)
    rows = torch.tensor([[3, 999, -1], [500, 3, 8]])
    with Largest([*table.state().values(), table.place]) as largest:
        table.fetch(rows)
        table.lookup(rows).sum().backward()
        table.step(0.1)
    assert 0 < largest.num_elements <= rows.numel() * 4


@pytest.mark.parametrize("averages", [False, True])
def test_ten_thousand_new_units_change_no_other_row(averages: bool) -> None:
    plain, grown = UnitTable(KEYS, 4, CPU, averages), UnitTable(KEYS, 4, CPU, averages)
    new = [f"d/t/{i}" for i in range(10_000)]
    for step in range(6):
        if step == 3:
            grown.grow(new)
        for table in (plain, grown):
            used(table, torch.tensor([[step, (step + 2) % 6]]))
    assert grown.keys == [*KEYS, *new] and len(grown) == 10_006
    for name, tensor in grown.state().items():
        assert torch.equal(tensor[:6], plain.state()[name])
    assert torch.equal(grown.weight[6:], initial_rows(new, 4))
    used(grown, torch.tensor([[10_005]]))
    assert not torch.equal(grown.weight[-1:], initial_rows(new[-1:], 4))


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


def test_a_table_that_is_put_back_is_as_it_began() -> None:
    """A spike that is undone has moved rows that the checkpoint before it does not have."""
    table, untouched = (UnitTable(KEYS, 4, CPU, averages=True) for _ in range(2))
    used(table, torch.tensor([[0, 2]]))
    assert not torch.equal(table.weight, untouched.weight)
    table.reset()
    for name, tensor in table.state().items():
        assert torch.equal(tensor, untouched.state()[name]), name


def test_a_table_of_strangers_takes_nothing_over() -> None:
    assert UnitTable(["x"], 4, CPU).load(UnitTable(KEYS, 4, CPU).state(), KEYS) == 0
