"""Starting a run: what is wrong is said before a rank is started, and nothing is written.

In: command lines as a user types them. Out: exit codes, messages.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from train_builders import handmade_run, tiny_run, tiny_store

from prep.settings import ConfigError
from prep.store import Store
from train import config, hostfile, start
from train.__main__ import main


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.mktemp("store"))


def command(store: Path, out: Path, hosts: str, *more: str) -> list[str]:
    paths = ["--config", "train/configs/debug.yaml", "--store", str(store), "--out", str(out), "--hostfile", hosts]
    return ["train", *paths, *more]


@pytest.fixture
def hosts(tmp_path: Path) -> str:
    path = tmp_path / "hosts"
    path.write_text("localhost slots=2\n")
    return str(path)


def test_a_missing_hostfile_stops_the_launch(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(store, tmp_path / "run", str(tmp_path / "nowhere"))) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_wrong_hostfile_stops_the_launch(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad").write_text("localhost slots=2.5\n")
    assert main(command(store, tmp_path / "run", str(tmp_path / "bad"))) == 2
    assert "line 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_batch_that_the_ranks_cannot_share_is_refused_before_the_launch(
    store: Path, tmp_path: Path, hosts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(store, tmp_path / "run", hosts, "train.global_batch_size=24")) == 2
    assert "not a multiple of micro_batch_size x ranks (16 x 2)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_weights_of_what_the_store_does_not_have_are_refused_before_the_launch(
    store: Path, tmp_path: Path, hosts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(store, tmp_path / "run", hosts, "data.weights.datasets={d2: 3}")) == 2
    assert "data.weights.datasets: the store has no 'd2'. It has d1." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_what_would_run_and_writes_nothing(
    store: Path, tmp_path: Path, hosts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(store, tmp_path / "run", hosts, "--dry-run")) == 0
    assert "worker" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_become_another_model_or_start_afresh_among_old_checkpoints(store: Path, tmp_path: Path) -> None:
    run = tiny_run()
    out = tmp_path / "run"
    handmade_run(out, store, run)
    with pytest.raises(ConfigError, match="holds a run of another model"):
        start.prepare(start.config.RunConfig(), Store(store), out)
    stages = (config.ContextFrom(from_step=5, context_s=2.0),)
    for change in ({"global_batch_size": 8}, {"families": ("encoding",)}, {"context_schedule": stages}):
        with pytest.raises(ConfigError, match="has trained on data in another order"):
            start.prepare(replace(run, train=replace(run.train, **change)), Store(store), out)
    weights = config.Weights(sessions={"d1/new": 2.0})  # those of old sessions are kept by the eras of a checkpoint
    data = replace(run.data, num_workers=2, bad_windows="skip", weights=weights)
    start.prepare(replace(run, data=data), Store(store), out)
    weights = config.Weights(families={"encoding": {"traces": 2.0}})  # of which eras keep nothing
    with pytest.raises(ConfigError, match="and weights if no family has its own"):
        start.prepare(replace(run, data=replace(run.data, weights=weights)), Store(store), out)
    with pytest.raises(ConfigError, match="--resume never would mix two runs"):
        start.prepare(run, Store(store), out, "never")


def test_hosts_beyond_those_that_are_used_are_spares(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hostfile, "addresses", lambda name: {name})
    path = tmp_path / "three"
    path.write_text("a.invalid slots=1\nb.invalid slots=1\nc.invalid slots=1\n")
    assert main(command(store, tmp_path / "run", str(path), "--nodes", "2", "--dry-run")) == 0
    printed = capsys.readouterr().out
    assert "b.invalid: rank 1, started by an agent" in printed and printed.endswith("spare: c.invalid\n")
    for number in ("4", "0", "-1"):
        assert main(command(store, tmp_path / "run", str(path), f"--nodes={number}", "--dry-run")) == 2
        assert f"--nodes {number}, but {path} has 3 host(s). Give 1 to 3." in capsys.readouterr().err
