"""Full fine-tuning: a run begins with the weights and rows of a hub folder, whatever cuts them among ranks.

In: a moved model, exported with some of its rows; real ranks that do a step which moves nothing. Out: what their
checkpoints hold, compared for equality; what is refused.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from train_builders import ROOT, handmade_run, moved_trained, tiny_run, tiny_store, train_ranks, with_small_threshold

from prep.settings import ConfigError
from prep.store import Store
from train import export, start
from train.__main__ import main
from train.config import ModelConfig, RunConfig
from train.model.processing_brainloom import BrainloomProcessor
from train.pretrained import check
from train.trained import Trained, load_trained
from train.unit_table import initial_rows

NUM_UNKNOWN = 4  # the first units of the table
STILL = tiny_run(num_steps=1, lr=1e-30, unit_lr=1e-30, weight_decay=0.0, average_steps=6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Its rows are moved as well."""
    found = moved_trained(tiny_store(tmp_path_factory.getbasetemp()), STILL)
    found.table.weight.add_(torch.randn(found.table.weight.shape, generator=torch.Generator().manual_seed(1)))
    return found


@pytest.fixture(scope="module")
def hub(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, and all of its rows but those of four units."""
    folder = tmp_path_factory.mktemp("pretrained") / "hub"
    export.export(trained, folder, None)
    processor = BrainloomProcessor.from_pretrained(folder)
    held = [row for row, key in enumerate(processor.unit_keys) if key not in trained.table.keys[:NUM_UNKNOWN]]
    rows = {name: column[held] for name, column in processor.units.items()}
    processor.with_units([processor.unit_keys[row] for row in held], rows).save_pretrained(folder)
    return folder


def changed(run: RunConfig, **overrides: object) -> RunConfig:
    return replace(run, model=ModelConfig(overrides={**run.model.overrides, **overrides}))


def begins_with(trained: Trained, hub: Path, out: Path, run: RunConfig) -> None:
    """Two ranks begin with what the folder has, to the last bit."""
    check(hub, run)
    start.prepare(run, Store(trained.store.address), out, hub=hub)
    assert train_ranks(out) == 0
    num_rows = len(trained.table.keys)
    said = (out / "logs" / "rank-00000.log").read_text()
    assert f"starting with the weights of {hub} ({num_rows - NUM_UNKNOWN} of {num_rows} unit rows)" in said
    found = load_trained(out)
    for key, parameter in trained.model.named_parameters():
        assert torch.equal(found.model.get_parameter(key), parameter), key
    row = {key: number for number, key in enumerate(found.table.keys)}
    here = torch.tensor([row[key] for key in trained.table.keys])
    fresh, known = found.table.weight[here].split([NUM_UNKNOWN, num_rows - NUM_UNKNOWN])
    assert torch.equal(known, trained.table.weight[NUM_UNKNOWN:])
    assert torch.equal(fresh, initial_rows(trained.table.keys[:NUM_UNKNOWN], fresh.shape[1]))


def test_two_ranks_begin_with_its_weights_and_rows(trained: Trained, hub: Path, tmp_path: Path) -> None:
    """Dropout and the loss's weights may be others."""
    anew = changed(STILL, hidden_dropout=0.1, modality_weights={"spikes": 3.0})
    begins_with(trained, hub, tmp_path / "run", with_small_threshold(anew, tmp_path))


@pytest.mark.slow
def test_so_they_do_where_another_optimizer_has_cut_them_another_way(
    trained: Trained, hub: Path, tmp_path: Path
) -> None:
    muon = replace(STILL.train, optimizer="muon")
    begins_with(
        trained,
        hub,
        tmp_path / "run",
        replace(STILL, ds_config=str(ROOT / "ds_configs" / "zero1.json"), train=muon),
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"hidden_size": 64},
            r"holds another model than this run's: hidden_size 32 \(here 64\)\. Set these keys under",
        ),
        ({"num_attention_heads": 1}, r"num_attention_heads 2 \(here 1\)"),
        ({"likelihoods": {"traces": "calcium"}}, r"likelihoods .*gaussian.*here .*calcium"),
    ],
)
def test_another_architecture_is_named(hub: Path, overrides: dict[str, object], message: str) -> None:
    """Also where every weight would fit, and mean something else."""
    with pytest.raises(ConfigError, match=message):
        check(hub, changed(STILL, **overrides))


def test_weights_of_another_version_are_refused(hub: Path, tmp_path: Path) -> None:
    other = shutil.copytree(hub, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.old_proj.weight"] = weights.pop("model.latent_embed")
    save_file(weights, other / "model.safetensors")
    with pytest.raises(ConfigError, match=r"another version: model\.latent_embed is None there and \[.*\(2 differ\)"):
        check(other, STILL)


def test_a_folder_without_a_model_is_refused_before_anything_starts(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hosts = tmp_path / "hostfile"
    hosts.write_text("localhost slots=1\n")
    STILL.save(tmp_path / "run.yaml")
    command = ["train", "--config", str(tmp_path / "run.yaml"), "--store", trained.store.address]
    command += ["--out", str(tmp_path / "out"), "--hostfile", str(hosts), "--hub", str(tmp_path)]
    for more in ([], ["--dry-run"]):
        assert main([*command, *more]) == 2
        assert f"{tmp_path} is no hub folder: it has no config.json" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_run_that_is_there_does_not_begin_anew_with_a_hub_folder(trained: Trained, hub: Path, tmp_path: Path) -> None:
    store = Store(trained.store.address)
    handmade_run(tmp_path / "run", Path(store.address), STILL)
    with pytest.raises(ConfigError, match=r"began with weights of its own, not with .* Give another OUT"):
        start.prepare(STILL, store, tmp_path / "run", hub=hub)
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    assert content["hub"] is None
    (tmp_path / "run" / "run.json").write_text(json.dumps({**content, "hub": str(hub.resolve())}))
    start.prepare(STILL, store, tmp_path / "run", hub=hub)
    start.prepare(STILL, store, tmp_path / "run")
    assert start.begun_with(tmp_path / "run", "hub") == hub.resolve(), "the same command, and one without it, go on"


def test_the_same_command_goes_on_where_the_hub_folder_is_gone(
    trained: Trained, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = shutil.copytree(hub, tmp_path / "hub")
    handmade_run(tmp_path / "run", Path(trained.store.address), STILL)
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**content, "hub": str(began.resolve())}))
    shutil.rmtree(began)
    STILL.save(tmp_path / "run.yaml")
    (tmp_path / "hostfile").write_text("localhost slots=1\n")
    launched: list[object] = []
    monkeypatch.setattr(start.launch, "launch", lambda *given: launched.append(given) or 0)
    command = ["train", "--config", str(tmp_path / "run.yaml"), "--store", trained.store.address]
    command += ["--out", str(tmp_path / "run"), "--hostfile", str(tmp_path / "hostfile"), "--hub", str(began)]
    assert main(command) == 0 and len(launched) == 1
