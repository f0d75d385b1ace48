"""Resume on another number of ranks, and as a branch of another run.

In: real ranks, stopped and started again. Out: the losses of the run that was never stopped.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from train_builders import handmade_run, losses, prepare_run, tiny_run, tiny_store, train_ranks, with_small_threshold

from prep.settings import ConfigError
from prep.store import Store
from train import checkpoint, start
from train.metrics import read_metrics


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_then_one_then_three_then_two_are_two_all_along(tmp_path: Path) -> None:
    """Two groups of parameters with a decay and a learning rate of their own, averages and unit rows included."""
    store = tiny_store(tmp_path)
    own = {"weight_decay": 0.1, "vector_lr_scale": 0.3, "average_steps": 6, "schedule": "wsd", "global_batch_size": 12}
    run = with_small_threshold(tiny_run(num_steps=12, **own), tmp_path)
    undisturbed = prepare_run(tmp_path / "undisturbed", store, run)
    assert train_ranks(undisturbed) == 0
    moved = tmp_path / "moved"
    for num_steps, slots in ((3, 2), (6, 1), (9, 3), (12, 2)):
        prepare_run(moved, store, replace(run, train=replace(run.train, num_steps=num_steps)))
        assert train_ranks(moved, "--resume", "auto" if num_steps == 3 else "must", slots=slots) == 0
    pairs = list(zip(losses(moved), losses(undisturbed), strict=True))
    assert max(abs(a - b) for a, b in pairs) < 1e-5, pairs
    rows, expected = (checkpoint.newest_of_run(out).table()[0] for out in (moved, undisturbed))
    assert (rows["num_updates"] == expected["num_updates"]).all() and rows["num_updates"].any()
    assert (rows["weight"] - expected["weight"]).abs().max() < 1e-3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_branch_starts_at_another_runs_checkpoint_and_only_decays(tmp_path: Path) -> None:
    store = tiny_store(tmp_path)
    trunk = replace(tiny_run(num_steps=8, schedule="wsd"), checkpoint_every=4)
    long_run = prepare_run(tmp_path / "trunk", store, trunk)
    whole = replace(trunk, train=replace(trunk.train, num_steps=7, decay_steps=3))
    in_one = prepare_run(tmp_path / "in-one", store, whole)
    assert train_ranks(long_run) == 0 and train_ranks(in_one) == 0

    asked = replace(trunk, train=replace(trunk.train, decay_steps=3))
    out = tmp_path / "branch"
    run, origin = start.branch(asked, long_run / "checkpoints" / "step-00000004", out)
    assert origin.name == "step-00000004" and run.train.num_steps == 7
    start.prepare(run, Store(store), out, origin=origin)
    assert train_ranks(out) == 0
    assert [row["loss"] for row in read_metrics(out)] == losses(in_one)[4:], "as if it had decayed in the first place"
    assert losses(in_one)[:5] == losses(long_run)[:5]
    again, _ = start.branch(asked, long_run, out)
    assert again == run, "the branch stays where it began, though the other run is at step 8"


def test_a_branch_that_does_not_decay_is_refused(tmp_path: Path) -> None:
    for asked in (tiny_run(), tiny_run(schedule="wsd")):
        with pytest.raises(ConfigError, match=r"train.decay_steps is 0\. Give train.schedule=wsd train.decay_steps=N"):
            start.branch(asked, tmp_path / "other", tmp_path / "branch")


def test_a_branch_of_another_model_or_of_nothing_is_refused(tmp_path: Path) -> None:
    store, run = tiny_store(tmp_path), tiny_run(schedule="wsd", decay_steps=3)
    handmade_run(tmp_path / "other", store, run)
    with pytest.raises(ConfigError, match=r"step-00000001 has trained on data in another order"):
        start.branch(replace(run, seed=4), tmp_path / "other", tmp_path / "branch")
    with pytest.raises(checkpoint.CheckpointError, match=r"has no sealed checkpoint \(0 damaged\)\. Train first"):
        start.branch(run, tmp_path / "nothing", tmp_path / "branch")
    branched, origin = start.branch(run, tmp_path / "other", tmp_path / "branch")
    assert branched.train.num_steps == 4 and origin == tmp_path / "other" / "checkpoints" / "step-00000001"
