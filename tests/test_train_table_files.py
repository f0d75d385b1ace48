"""Rows on disk: by key, from any number of ranks to any other; what moved since a full save, and the full save itself.

In: tables of one process that stand for those of many, and checkpoints that hold nothing else. Out: the same rows.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from train import table_files
from train.checkpoint import CheckpointError, newest, open_checkpoint, prune, seal
from train.unit_table import UnitTable

CPU = torch.device("cpu")
KEYS = [f"d/s/{i}" for i in range(50)]


@pytest.fixture(autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "rendezvous"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def table_of(rank: int = 0, num_ranks: int = 1, keys: list[str] = KEYS, averages: bool = False) -> UnitTable:
    """What one of several ranks holds; it takes part in no exchange."""
    group: Any = SimpleNamespace(rank=lambda: rank, size=lambda: num_ranks)
    return UnitTable(keys, 4, CPU, averages, group if num_ranks > 1 else None)


def move(table: UnitTable, rows: list[int], step: int) -> None:
    """One optimizer step on some rows."""
    (table.lookup(torch.tensor([rows])) * torch.arange(1.0, 5.0)).sum().backward()
    table.step(0.1, step)


def save(table: UnitTable, root: Path, step: int) -> Path:
    """A checkpoint that holds nothing but the table, written as saving.Saver does."""
    folder = root / f"step-{step:08d}"
    folder.mkdir()
    full_step = table_files.full_save(table)
    save_file(table_files.moved_rows(table, full_step), folder / table_files.file_name(step, 0))
    source = table.saved_in and table.saved_in[0]
    seal(folder, step, table_files.link_full_save(source, full_step, folder))
    table.saved_in = folder, step
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("units-*"))


def read(folder: Path, table: UnitTable) -> dict[str, Tensor]:
    """A table that takes over what is in a checkpoint, as checkpoint.restore does."""
    for state, keys in table_files.parts(folder):
        table.load(state, keys)
    return table.state()


@pytest.fixture
def trained() -> UnitTable:
    """Forty rows of fifty moved, some more than once."""
    table = table_of()
    for step in range(1, 9):
        move(table, [*range(5 * step - 5, 5 * step), 0, 7], step)
    return table


def shares_of(table: UnitTable, folder: Path, num_ranks: int) -> Path:
    """A folder with the rows of a table as several ranks would have saved them."""
    for rank in range(num_ranks):
        share = table_of(rank, num_ranks)
        assert share.load(table.state(), table.keys) == len(share.keys) < len(KEYS) + (num_ranks == 1)
        save_file(table_files.moved_rows(share, 0), folder / table_files.file_name(8, rank))
    return folder


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
@pytest.mark.parametrize("before", [1, 3, 4])
def test_rows_saved_on_some_ranks_are_loaded_on_others(
    trained: UnitTable, tmp_path: Path, before: int, num_ranks: int
) -> None:
    folder = shares_of(trained, tmp_path, before)
    found: set[str] = set()
    for rank in range(num_ranks):
        share = table_of(rank, num_ranks)
        for name, tensor in read(folder, share).items():
            assert torch.equal(tensor, trained.state()[name][[KEYS.index(key) for key in share.keys]])
        found |= {*share.keys}
    assert found == {*KEYS}


def test_rows_that_never_moved_are_not_saved_and_come_back_from_their_keys(trained: UnitTable, tmp_path: Path) -> None:
    folder = save(trained, tmp_path, 8)
    _, keys = table_files.merged(folder)
    assert keys == KEYS[:40]
    assert torch.equal(read(folder, table_of())["weight"], trained.weight)


def test_a_table_that_knows_some_of_the_keys_takes_those(trained: UnitTable, tmp_path: Path) -> None:
    other = table_of(keys=["x/y/0", *KEYS[3:6]])
    fresh = other.weight.clone()
    assert torch.equal(read(save(trained, tmp_path, 8), other)["weight"][1:], trained.weight[3:6])
    assert torch.equal(other.weight[0], fresh[0])


def test_what_moved_since_the_full_save_is_enough(trained: UnitTable, tmp_path: Path) -> None:
    save(trained, tmp_path, 8)
    for step in (9, 10):
        move(trained, [3, step], step)
        folder = save(trained, tmp_path, step)
        assert names(folder) == ["units-00000008-00000.safetensors", f"units-{step:08d}-00000.safetensors"]
    *_, (_, keys) = table_files.parts(folder)
    assert keys == ["d/s/3", "d/s/9", "d/s/10"], "what moved since the full save, not since the last one"
    whole, its_keys = table_files.merged(open_checkpoint(folder).path)
    assert torch.equal(whole["weight"], trained.weight[[KEYS.index(key) for key in its_keys]])
    assert torch.equal(read(folder, table_of())["weight"], trained.weight)


def test_all_is_saved_again_once_half_of_it_has_moved(trained: UnitTable, tmp_path: Path) -> None:
    save(trained, tmp_path, 8)
    move(trained, [*range(19)], 9)
    assert len(names(save(trained, tmp_path, 9))) == 2
    move(trained, [19], 10)
    assert names(save(trained, tmp_path, 10)) == ["units-00000010-00000.safetensors"]


def test_a_resumed_table_goes_on_from_the_full_save_of_its_checkpoint(trained: UnitTable, tmp_path: Path) -> None:
    save(trained, tmp_path, 8)
    move(trained, [3], 9)
    folder, resumed = save(trained, tmp_path, 9), table_of()
    read(folder, resumed)
    resumed.saved_in = folder, 9
    for table, root in ((trained, tmp_path / "a"), (resumed, tmp_path / "b")):
        root.mkdir()
        move(table, [4], 10)
        assert len(names(save(table, root, 10))) == 2
    files = [open_checkpoint(tmp_path / run / "step-00000010").manifest["files"] for run in "ab"]
    assert files[0] == files[1]


def test_a_run_that_starts_anew_does_not_build_on_what_lies_there(trained: UnitTable, tmp_path: Path) -> None:
    save(trained, tmp_path, 8)
    anew = table_of()
    move(anew, [1], 1)
    folder = save(anew, tmp_path, 9)
    assert len(names(folder)) == 1 and torch.equal(read(folder, table_of())["weight"], anew.weight)


def test_a_run_that_counts_its_steps_anew_saves_all(trained: UnitTable, tmp_path: Path) -> None:
    save(trained, tmp_path, 8)
    move(trained, [1], 1)
    folder = save(trained, tmp_path, 9)
    assert len(names(folder)) == 1 and torch.equal(read(folder, table_of())["weight"], trained.weight)


def test_a_checkpoint_is_whole_when_the_full_save_it_builds_on_is_gone(trained: UnitTable, tmp_path: Path) -> None:
    save(trained, tmp_path, 8)
    for step in (9, 10, 11):
        move(trained, [step], step)
        save(trained, tmp_path, step)
        prune(tmp_path, keep=1)
    found, passed_over = newest(tmp_path)
    assert found is not None and not passed_over and [path.name for path in tmp_path.iterdir()] == ["step-00000011"]
    assert torch.equal(read(found.path, table_of())["weight"], trained.weight)


def test_where_no_link_can_be_made_the_full_save_is_copied(
    trained: UnitTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: Path) -> None:
        raise OSError("Operation not permitted")

    monkeypatch.setattr(table_files.os, "link", refuse)
    save(trained, tmp_path, 8)
    move(trained, [3], 9)
    folder = save(trained, tmp_path, 9)
    assert torch.equal(read(open_checkpoint(folder).path, table_of())["weight"], trained.weight)
    assert (folder / names(folder)[0]).stat().st_nlink == 1


def damage(path: Path) -> None:
    """Flip one bit, in place."""
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))


def test_damage_of_a_full_save_is_never_sealed_as_sound(trained: UnitTable, tmp_path: Path) -> None:
    damage(save(trained, tmp_path, 8) / "units-00000008-00000.safetensors")
    move(trained, [3], 9)
    with pytest.raises(CheckpointError, match=r"units-00000008-00000.safetensors is missing or damaged"):
        open_checkpoint(save(trained, tmp_path, 9))


def test_the_checkpoints_that_are_kept_do_not_all_share_one_file(trained: UnitTable, tmp_path: Path) -> None:
    save(trained, tmp_path, 7)
    trained.saved_in = None
    save(trained, tmp_path, 8)
    for step in (9, 10):
        move(trained, [step], step)
        save(trained, tmp_path, step)
        prune(tmp_path, keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000007", "step-00000009", "step-00000010"]
    damage(tmp_path / "step-00000010" / "units-00000008-00000.safetensors")
    found, passed_over = newest(tmp_path)
    assert found is not None and found.step == 7 and len(passed_over) == 2


def test_rows_begin_their_average_where_the_run_begins_to_keep_one(trained: UnitTable, tmp_path: Path) -> None:
    folder, averaging = save(trained, tmp_path, 8), table_of(averages=True)
    assert torch.equal(read(folder, averaging)["average"], trained.weight)
    averaging.saved_in = folder, 8
    move(averaging, [3], 9)
    state, keys = table_files.merged(save(averaging, tmp_path, 9))
    assert torch.equal(state["average"], averaging.state()["average"][[KEYS.index(key) for key in keys]])
