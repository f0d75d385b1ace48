"""Checkpoints: pieces by name and offset for any number of ranks; what is not sealed or not whole is passed over.

In: checkpoints sealed by hand. Out: the same numbers, or an error that names the file.
"""

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch
from train_builders import ROOT, handmade_checkpoint, moved_trained, tiny_run, tiny_store

from train import checkpoint
from train.checkpoint import CheckpointError, full_state, newest, open_checkpoint, prune, seal
from train.saving import clear_unsealed
from train.trained import Trained

FILES = (
    "manifest.json",
    "rank-00000.safetensors",
    "rank-00001.safetensors",
    "rank-00002.safetensors",
    "state.json",
    "units-00000007-00000.safetensors",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return moved_trained(tiny_store(tmp_path_factory.getbasetemp()), tiny_run())


@pytest.fixture(scope="module")
def sealed(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step 7, as three ranks write it."""
    return handmade_checkpoint(tmp_path_factory.mktemp("run") / "step-00000007", trained, 7, num_ranks=3)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7])
def test_pieces_of_three_ranks_are_put_together_for_any_number(sealed: Path, trained: Trained, num_ranks: int) -> None:
    found = open_checkpoint(sealed)
    for name in ("model.latent_embed", "readout.bias_proj.bias", "model.layers.1.mlp.down_proj.weight"):
        flat = trained.model.get_parameter(name).detach().flatten()
        size = -(-len(flat) // num_ranks)
        for begin in range(0, len(flat), size):
            end = min(begin + size, len(flat))
            assert torch.equal(found.parameter(name, "master", begin, end), flat[begin:end])
            assert not found.parameter(name, "exp_avg", begin, end).any()


def test_all_weights_come_back_whole(sealed: Path, trained: Trained) -> None:
    weights = full_state(open_checkpoint(sealed))
    assert weights.keys() == dict(trained.model.named_parameters()).keys()
    assert all(torch.equal(weights[name], parameter) for name, parameter in trained.model.named_parameters())
    state, keys = open_checkpoint(sealed).table()
    assert keys == trained.table.keys and torch.equal(state["weight"], trained.table.weight)


def test_a_parameter_that_is_not_there_is_an_error(sealed: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has 0 of 4 elements of model.nothing \(master\). It is not this model"):
        open_checkpoint(sealed).parameter("model.nothing", "master", 0, 4)
    with pytest.raises(CheckpointError, match=r"has 2 of 6 elements of readout.bias_proj.bias \(exp_avg\)"):
        open_checkpoint(sealed).parameter("readout.bias_proj.bias", "exp_avg", 0, 6)


def test_a_folder_that_was_never_sealed_is_no_checkpoint(sealed: Path, tmp_path: Path) -> None:
    older = shutil.copytree(sealed, tmp_path / "step-00000007")
    younger = shutil.copytree(sealed, tmp_path / "step-00000009")
    (younger / "manifest.json").unlink()
    shutil.copytree(sealed, tmp_path / ".step-00000011.partial")
    found, passed_over = newest(tmp_path)
    assert found is not None and found.path == older
    assert passed_over == [f"{younger} has no manifest.json: it was never sealed. Use an earlier checkpoint."]


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert newest(tmp_path / "checkpoints") == (None, [])


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_passed_over_by_name_and_the_older_one_is_used(
    sealed: Path, tmp_path: Path, name: str, damage: str
) -> None:
    assert sorted(path.name for path in sealed.iterdir()) == list(FILES)
    shutil.copytree(sealed, tmp_path / "step-00000007")
    path = shutil.copytree(sealed, tmp_path / "step-00000009") / name
    content = path.read_bytes()
    place = len(content) // 2
    flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:-1] if damage == "truncated" else flipped)
    found, passed_over = newest(tmp_path)
    assert found is not None and found.path.name == "step-00000007"
    assert len(passed_over) == 1 and name in passed_over[0] and "Use an earlier checkpoint." in passed_over[0]


@pytest.mark.parametrize("key", ["step", "files", "fragments"])
def test_a_manifest_that_says_something_else_is_damaged(sealed: Path, tmp_path: Path, key: str) -> None:
    folder = shutil.copytree(sealed, tmp_path / "step-00000007")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[key] = 8 if key == "step" else {}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        open_checkpoint(folder)


def test_an_unknown_format_is_refused(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "CHECKPOINT_FORMAT", 9)
    folder = handmade_checkpoint(tmp_path / "step-00000001", trained)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"is checkpoint format 9; this code reads \[2\]. Update the code."):
        open_checkpoint(folder)


def test_old_checkpoints_are_removed_but_for_some_that_are_kept_for_ever(sealed: Path, tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        shutil.copytree(sealed, tmp_path / f"step-{step:08d}")
    (tmp_path / ".step-00000080.partial").mkdir()  # being written at this moment
    prune(tmp_path, keep=3, keep_every=20)
    kept = [20, 40, 50, 60, 70]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-{step:08d}" for step in kept]
    prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".step-00000080.partial",
        "step-00000060",
        "step-00000070",
    ]
    clear_unsealed(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000060", "step-00000070"]


def test_a_manifest_is_written_last_and_lists_every_file(tmp_path: Path, trained: Trained) -> None:
    folder = handmade_checkpoint(tmp_path / "step-00000001", trained)
    newest_file = max(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert newest_file.name == "manifest.json" and manifest["format"] == 2 and manifest["step"] == 1
    assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    (tmp_path / "empty").mkdir()
    seal(tmp_path / "empty", 3)
    assert open_checkpoint(tmp_path / "empty").step == 3


def test_no_module_of_train_can_write_or_read_a_pickle() -> None:
    forbidden = {"torch.load", "torch.save", "save_checkpoint", "load_checkpoint", "save_16bit_model"}
    for path in sorted((ROOT / "train").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"pickle", "dill", "joblib", "cloudpickle"} & {name.split(".")[0] for name in names}, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in forbidden and called.split(".")[-1] not in forbidden, f"{path}:{node.lineno}"
                allow = [ast.unparse(word.value) for word in node.keywords if word.arg == "allow_pickle"]
                assert allow in ([], ["False"]), f"{path}:{node.lineno}"
