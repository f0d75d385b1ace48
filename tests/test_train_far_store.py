"""Training on a store in a bucket: the losses of the local store, in every process that opens it.

In: a tiny store, an S3 server on loopback. Out: run folders, compared for equality.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import remote_builders
from train_builders import losses, prepare_run, rank_environment, tiny_run, tiny_store, train_ranks

from prep.store import Store
from train import config
from train.__main__ import main
from train.rank_environment import forwarded, shown

URL = "s3://lab/tiny"

nothing_of_this_machine = pytest.fixture(autouse=True)(remote_builders.nothing_of_this_machine)
s3_address = pytest.fixture(scope="module")(remote_builders.s3_server)
bucket = pytest.fixture(remote_builders.empty_bucket)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.getbasetemp())


@pytest.mark.slow
def test_training_from_a_bucket_has_the_losses_of_the_local_store(
    bucket: Any, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in store.rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            remote_builders.put(bucket, f"tiny/{path.relative_to(store)}", path.read_bytes())
    run = tiny_run(num_steps=3)
    local = prepare_run(tmp_path / "local", store, run)
    assert train_ranks(local, slots=1) == 0
    monkeypatch.setenv("BRAINLOOM_CACHE", str(tmp_path / "cache"))
    for name, value in rank_environment().items():
        monkeypatch.setenv(name, value)
    (tmp_path / "hosts").write_text("localhost slots=1\n")
    replace(run, data=replace(run.data, num_workers=1)).save(tmp_path / "run.yaml")
    words = ["--config", str(tmp_path / "run.yaml"), "--store", URL, "--out", str(tmp_path / "far")]
    assert main(["train", *words, "--hostfile", str(tmp_path / "hosts")]) == 0
    assert losses(tmp_path / "far") == losses(local)
    assert json.loads((tmp_path / "far" / "run.json").read_text())["store"] == URL
    digests = [json.loads((out / "environment.json").read_text())["store_digest"] for out in (local, tmp_path / "far")]
    assert digests == [Store(store).digest()] * 2
    assert config.load(tmp_path / "far" / "config.yaml").data.num_workers == 1


def test_a_store_that_is_not_in_the_bucket_stops_the_launch(
    bucket: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts").write_text("localhost slots=1\n")
    words = ["--config", "train/configs/debug.yaml", "--store", URL, "--out", str(tmp_path / "far")]
    assert main(["train", *words, "--hostfile", str(tmp_path / "hosts")]) == 2
    assert f"{URL}/catalog.json is missing. Is this a token store? Run `make prep" in capsys.readouterr().err
    assert not (tmp_path / "far").exists()


def test_other_hosts_get_the_settings_and_the_keys_of_s3_and_no_key_is_shown() -> None:
    settings = {"AWS_ENDPOINT_URL": "http://10.0.0.1:9000", "AWS_PROFILE": "lab", "BRAINLOOM_CACHE": "/local"}
    secrets = {"AWS_ACCESS_KEY_ID": "kept-a", "AWS_SECRET_ACCESS_KEY": "kept-b", "AWS_SESSION_TOKEN": "kept-c"}
    found = forwarded({**settings, **secrets, "HOME": "/root", "TORCH_EXTENSIONS_DIR": "/x"})
    assert found == {**settings, **secrets, "TORCH_EXTENSIONS_DIR": "/x"}
    lines = shown(found)
    assert "AWS_PROFILE=lab" in lines and "AWS_SECRET_ACCESS_KEY=(not shown)" in lines and "kept" not in "".join(lines)
