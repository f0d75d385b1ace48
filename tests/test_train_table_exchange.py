"""The unit table on 1, 2 and 4 real ranks: a dense embedding under the same sparse Adam, and a share of the memory.

In: processes that train the rows of made-up batches. Out: rows by key, compared with one dense table.

The batch of a step is the same on any number of ranks: four samples, one of them, at times, without any row.
"""

import datetime
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, multiprocessing, nn

from train.table_files import file_name, merged, moved_rows
from train.unit_table import BETAS, EPS, UnitTable, initial_rows

CPU = torch.device("cpu")
NUM_STEPS, NUM_SAMPLES, NUM_SOURCES, SIZE = 50, 4, 12, 8
LR, KEEP = 0.01, 0.9
KEYS = [f"d/s/{i}" for i in range(40)]
NEW = [f"d/t/{i}" for i in range(10_000)]
GROWN_AT = 25


def samples(step: int) -> Tensor:
    """Rows (4, S) of a step: some twice, some absent, and every third step a sample without any."""
    rows = torch.from_numpy(np.random.default_rng(step).integers(-1, len(KEYS), (NUM_SAMPLES, NUM_SOURCES)))
    rows[step % NUM_SAMPLES] = -1 if step % 3 == 0 else rows[step % NUM_SAMPLES]
    return rows


def objective(embeds: Tensor, step: int, sample: int) -> Tensor:
    """Of one sample (1, S, E); every place has a target of its own."""
    target = torch.sin(torch.arange(embeds.numel(), dtype=torch.float32) + 10 * step + sample).view_as(embeds)
    return ((embeds - target) ** 2).sum()


def train_step(table: UnitTable, step: int, rank: int, num_ranks: int, ahead: bool = True) -> None:
    """The rank's share of a step, one sample a micro-batch; the loss is the mean over all four."""
    own = range(NUM_SAMPLES)[rank * NUM_SAMPLES // num_ranks : (rank + 1) * NUM_SAMPLES // num_ranks]
    rows = samples(step)
    if ahead:
        table.fetch(*(rows[[sample]] for sample in own))
    for sample in own:
        (objective(table.lookup(rows[[sample]]), step, sample) / len(own)).backward()
    table.step(LR, step + 1, KEEP)


def train(rank: int, num_ranks: int, folder: Path) -> None:
    """One process: three tables; the second grows half-way, the third fetches nothing ahead."""
    store = dist.FileStore(str(folder / "rendezvous"), num_ranks)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=num_ranks, timeout=datetime.timedelta(seconds=60)
    )
    plain, grown, late = (UnitTable(KEYS, SIZE, CPU, True, dist.group.WORLD) for _ in range(3))
    for step in range(NUM_STEPS):
        if step == GROWN_AT:
            grown.grow(NEW)
        for table in (plain, grown, late):
            train_step(table, step, rank, num_ranks, ahead=table is not late)
    for name, table in {"plain": plain, "grown": grown, "late": late}.items():
        (folder / name).mkdir(exist_ok=True)
        save_file(moved_rows(table, -1), folder / name / file_name(NUM_STEPS, rank))
    bytes_held = sum(tensor.nbytes for tensor in grown.state().values())
    (folder / f"{rank}.json").write_text(json.dumps([bytes_held, float(plain.norm)]))
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[1, 2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Number of ranks, and what they left."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    multiprocessing.spawn(train, (request.param, folder), nprocs=request.param)
    return request.param, folder


@pytest.fixture(scope="module")
def dense() -> dict[str, Tensor]:
    """The reference: a dense `nn.Embedding`, its gradient whole, and Adam by hand on the rows that a step used."""
    table = nn.Embedding(len(KEYS) + 1, SIZE, padding_idx=len(KEYS))  # the last row is for what is absent
    table.weight.data[:-1] = initial_rows(KEYS, SIZE)
    table.weight.data[-1] = 0
    average, count = table.weight.detach().clone(), torch.zeros(len(KEYS) + 1, 1)
    moment1, moment2 = torch.zeros_like(average), torch.zeros_like(average)
    for step in range(NUM_STEPS):
        table.zero_grad()
        for sample, rows in enumerate(samples(step)):
            (objective(table(rows.where(rows >= 0, len(KEYS))[None]), step, sample) / NUM_SAMPLES).backward()
        gradient, weight = table.weight.grad, table.weight.data
        assert gradient is not None
        for row in set(samples(step).flatten().tolist()) - {-1}:
            count[row] += 1
            moment1[row] = BETAS[0] * moment1[row] + (1 - BETAS[0]) * gradient[row]
            moment2[row] = BETAS[1] * moment2[row] + (1 - BETAS[1]) * gradient[row] ** 2
            root = (moment2[row] / (1 - BETAS[1] ** count[row])).sqrt() + EPS
            weight[row] -= LR * moment1[row] / (1 - BETAS[0] ** count[row]) / root
            average[row] = KEEP * average[row] + (1 - KEEP) * weight[row]
    columns = {"weight": table.weight.detach(), "moment1": moment1, "moment2": moment2, "average": average}
    return {"num_updates": count[:, 0].long(), "norm": gradient.norm()[None], **columns}


@pytest.mark.parametrize("name", ["plain", "late"])
def test_it_is_a_dense_embedding_under_the_same_sparse_adam(
    ranks: tuple[int, Path], dense: dict[str, Tensor], name: str
) -> None:
    state, keys = merged(ranks[1] / name)
    assert sorted(keys) == sorted(KEYS)
    for column in ("weight", "moment1", "moment2", "average", "num_updates"):
        theirs = dense[column][[KEYS.index(key) for key in keys]]
        assert (state[column] - theirs).abs().max() < 1e-6, column
    assert len(set(state["num_updates"].tolist())) > 5, "counts that are all the same would prove nothing"


def test_every_rank_knows_the_norm_of_the_whole_gradient(ranks: tuple[int, Path], dense: dict[str, Tensor]) -> None:
    norms = [json.loads((ranks[1] / f"{rank}.json").read_text())[1] for rank in range(ranks[0])]
    assert len(set(norms)) == 1 and norms[0] == pytest.approx(float(dense["norm"]), rel=1e-6)


def test_ten_thousand_units_that_join_change_no_other_row(ranks: tuple[int, Path]) -> None:
    (plain, keys), (grown, more) = merged(ranks[1] / "plain"), merged(ranks[1] / "grown")
    assert sorted(more) == sorted(KEYS + NEW)
    place = {key: row for row, key in enumerate(more)}
    for column in plain:
        assert torch.equal(grown[column][[place[key] for key in keys]], plain[column])
    assert torch.equal(grown["weight"][[place[key] for key in NEW]], initial_rows(NEW, SIZE))


def test_a_rank_holds_its_share_of_the_bytes(ranks: tuple[int, Path]) -> None:
    num_ranks, folder = ranks
    held = [json.loads((folder / f"{rank}.json").read_text())[0] for rank in range(num_ranks)]
    whole = (len(KEYS) + len(NEW)) * (4 * 4 * SIZE + 2 * 8)  # weight, moments, average; two counts
    assert sum(held) == whole
    assert max(held) < 1.05 * whole / num_ranks
