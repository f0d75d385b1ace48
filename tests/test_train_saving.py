"""Saving beside the training: what ranks leave each other in the folder, what a full disk does, what is never used.

In: files of made-up ranks, and real ranks. Out: sealed checkpoints, or an error that names the file.
"""

import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_builders import losses, prepare_run, tiny_run, tiny_store, train_ranks

from train import checkpoint, saving
from train.checkpoint import CheckpointError, Files
from train.saving import Saver, clear_unsealed, collect, publish, write_files

# Rank 1 finds no room for its second checkpoint; rank 0 has long written its part.
NO_ROOM = """
import os, sys
from train import saving
write = saving.save_file
def full(tensors, path):
    if os.environ["RANK"] == "1" and "00000004" in str(path):
        raise OSError(28, "No space left on device")
    write(tensors, path)
saving.save_file = full
from train.__main__ import main
sys.exit(main(["worker", "--out", sys.argv[2]]))
"""


def files_of(rank: int) -> Files:
    """What a rank of two writes of a parameter of eight elements."""
    return {
        f"rank-{rank:05d}.safetensors": {f"weight|master|{4 * rank}": torch.arange(4.0) + 4 * rank},
        **({"state.json": "{}"} if rank == 0 else {}),
    }


def test_a_checkpoint_is_sealed_when_all_ranks_are_done_and_not_before(tmp_path: Path) -> None:
    folder = tmp_path / ".step-00000003.partial"
    write_files(folder, files_of(0), "rank-00000.done")
    sealing = threading.Thread(target=lambda: publish(folder, 3, collect(folder, 2)))
    sealing.start()
    time.sleep(5 * saving.LOOK_EVERY_S)
    assert sealing.is_alive() and not (folder / "manifest.json").exists()
    write_files(folder, files_of(1), "rank-00001.done")
    sealing.join(timeout=10)
    found = checkpoint.open_checkpoint(tmp_path / "step-00000003")
    assert torch.equal(found.parameter("weight", "master", 1, 7), torch.arange(1.0, 7.0))
    assert set(found.manifest["files"]) == {"rank-00000.safetensors", "rank-00001.safetensors", "state.json"}
    assert {path.name for path in found.path.iterdir()} == {*found.manifest["files"], "manifest.json"}
    assert not folder.exists()


def test_a_checkpoint_takes_the_place_of_a_damaged_one_of_its_step(tmp_path: Path) -> None:
    damaged = tmp_path / "step-00000003"
    damaged.mkdir()
    (damaged / "manifest.json").write_text("{")
    write_files(tmp_path / ".step-00000003.partial", files_of(0), "rank-00000.done")
    publish(tmp_path / ".step-00000003.partial", 3, collect(tmp_path / ".step-00000003.partial", 1))
    assert checkpoint.open_checkpoint(damaged).step == 3


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "state.json").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"state\.json cannot be written: .*No space left.*Nothing of this check"):
        write_files(tmp_path, files_of(0), "rank-00000.done")
    assert not (tmp_path / "rank-00000.done").exists()


def test_what_was_never_sealed_is_removed_at_the_start(tmp_path: Path) -> None:
    write_files(tmp_path / ".step-00000003.partial", files_of(0), "rank-00000.done")
    (tmp_path / "step-00000002").mkdir()
    clear_unsealed(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Saver:
    """The saver of the only rank, for a made-up engine: a tensor that training changes, no row of a unit."""
    monkeypatch.setattr(saving.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(saving.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(saving.table_files, "full_save", lambda table: 0)
    monkeypatch.setattr(
        checkpoint,
        "files_of",
        lambda engine, state, full_step, to_host: {"weight.safetensors": {"w": to_host("w", engine.weight)}},
    )
    return Saver(tmp_path / "checkpoints", tiny_run())


def engine_of(weight: torch.Tensor) -> Any:
    return SimpleNamespace(weight=weight, table=SimpleNamespace(saved_in=None))


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(
    alone: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, write = threading.Event(), saving.write_files
    monkeypatch.setattr(saving, "write_files", lambda *args: may_write.wait() and write(*args))
    weight = torch.zeros(4)
    alone.save(engine_of(weight), 1, {})  # returns, although nothing can be written yet
    weight += 1
    next_save = threading.Thread(target=alone.save, args=(engine_of(weight), 2, {}))
    next_save.start()
    time.sleep(0.1)
    assert next_save.is_alive() and not list(alone.root.glob("step-*")), "the next save waits for the former one"
    may_write.set()
    next_save.join(timeout=10)
    alone.wait()
    saved = [load_file(path / "weight.safetensors")["w"] for path in sorted(alone.root.glob("step-*"))]
    assert torch.equal(torch.stack(saved), torch.tensor([[0.0] * 4, [1.0] * 4]))


def test_what_goes_wrong_in_the_background_is_raised_between_steps(
    alone: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise CheckpointError("x/rank-00000.safetensors cannot be written")

    monkeypatch.setattr(saving, "write_files", fail)
    alone.check()
    alone.save(engine_of(torch.zeros(4)), 1, {})
    for ask in (alone.wait, alone.check, lambda: alone.save(engine_of(torch.zeros(4)), 2, {})):
        with pytest.raises(CheckpointError, match="cannot be written"):
            ask()
    assert not list(alone.root.glob("step-*"))


@pytest.mark.slow
def test_a_rank_without_room_ends_the_run_and_the_same_command_goes_on(tmp_path: Path) -> None:
    store, run = tiny_store(tmp_path), tiny_run(num_steps=6)
    out = prepare_run(tmp_path / "run", store, type(run)(**{**vars(run), "checkpoint_every": 2}))
    assert train_ranks(out, command=[sys.executable, "-c", NO_ROOM, "worker", str(out)]) == 2
    log = (out / "logs" / "rank-00001.log").read_text()
    assert ".step-00000004.partial/rank-00001.safetensors cannot be written: [Errno 28] No space left" in log
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-00000002", ".step-00000004.partial"}
    assert train_ranks(out, "--resume", "must") == 0
    assert "step-00000002 (step 2," in (out / "logs" / "rank-00000.log").read_text()
    assert len(losses(out)) == 6
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-00000004", "step-00000006"}
