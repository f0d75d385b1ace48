"""The hub folder: complete, documented, and used by a stranger with the same result as by us.

In: a moved model on a tiny store. Out: a hub folder, read here, and in a clean process that cannot import us.
"""

import argparse
import ast
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from train_builders import ROOT, handmade_run, moved_trained, one_window, tiny_run, tiny_store

from train import clean_process, evaluate, export
from train.dataset import Window
from train.export import ExportError
from train.masking import TASKS, Mask, Task, task_mask
from train.model.modeling_brainloom import BrainloomForPreTraining
from train.model.processing_brainloom import STANDARD_LIMIT, BrainloomProcessor, Stream
from train.trained import Trained

RUN = tiny_run()
CHECKED = (("full", TASKS[0]), ("blind", TASKS[3]), ("imaging", TASKS[11]))  # encoding, co-smoothing, decoding
SCORE = {
    "modality": "spikes",
    "task": "encoding",
    "visible": ["behavior"],
    "deviance_explained": 0.12345,
    "ceiling": 0.5,
    "ceiling_kind": "exact",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return moved_trained(tiny_store(tmp_path_factory.getbasetemp()), RUN)


@pytest.fixture(scope="module")
def hub(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "hub"
    unscored = {**SCORE, "task": "forecasting", "ceiling": None, "ceiling_kind": "null"}
    export.export(trained, folder, {"split": "test", "tasks": [SCORE, unscored]})
    return folder


@pytest.fixture(scope="module")
def processor(hub: Path) -> BrainloomProcessor:
    return BrainloomProcessor.from_pretrained(hub)


def asked(trained: Trained, session_id: str, task: Task, at_s: float = 20.0) -> tuple[Window, Mask]:
    window = one_window(trained.reader, session_id, at_s)
    return window, task_mask(task, window.tokens, 1.0)


def streams_of(raw: dict[str, Any]) -> list[Stream]:
    """The streams of a raw window, made from plain arrays."""
    names = ("values", "start_s", "offset_s", "visible", "asked")
    return [
        Stream(
            keys=[str(key) for key in raw[f"keys_{i}"]],
            modality=str(raw[f"modality_{i}"]),
            sample_s=float(raw[f"sample_s_{i}"]),
            **{name: raw[f"{name}_{i}"] for name in names},
        )
        for i in range(int(raw["num_streams"]))
    ]


# ---------------------------------------------------------------- the folder


def test_a_hub_folder_has_all_that_a_stranger_needs(hub: Path, trained: Trained) -> None:
    assert {path.name for path in hub.iterdir()} == {
        "README.md",
        "attention_brainloom.py",
        "config.json",
        "configuration_brainloom.py",
        "decoder_brainloom.py",
        "encoder_brainloom.py",
        "events_brainloom.py",
        "history_brainloom.py",
        "readout_brainloom.py",
        "stimulus_brainloom.py",
        "surround_brainloom.py",
        "likelihoods_brainloom.py",
        "model.safetensors",
        "modeling_brainloom.py",
        "preprocessor_config.json",
        "processing_brainloom.py",
        "unit_keys.json",
        "units.safetensors",
    }
    config = json.loads((hub / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_brainloom.BrainloomConfig",
        "AutoModel": "modeling_brainloom.BrainloomModel",
        "AutoModelForPreTraining": "modeling_brainloom.BrainloomForPreTraining",
    }
    assert config["model_type"] == "brainloom" and config["context_s"] == 1.0
    preprocessor = json.loads((hub / "preprocessor_config.json").read_text())
    assert preprocessor["auto_map"] == {"AutoFeatureExtractor": "processing_brainloom.BrainloomProcessor"}
    for name in ("attention", "configuration", "likelihoods", "modeling", "processing"):
        ours = ROOT / "train" / "model" / f"{name}_brainloom.py"
        assert (hub / ours.name).read_bytes() == ours.read_bytes()


def test_the_weights_are_the_trained_ones_bit_for_bit(hub: Path, trained: Trained) -> None:
    again = BrainloomForPreTraining.from_pretrained(hub).state_dict()
    assert again.keys() == trained.model.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in trained.model.state_dict().items())


def test_every_source_has_its_row_by_its_key(hub: Path, trained: Trained, processor: BrainloomProcessor) -> None:
    keys = json.loads((hub / "unit_keys.json").read_text())
    assert len(keys) == len(set(keys)) == sum(len(trained.reader.sources(i).row) for i in range(4))
    with safe_open(hub / "units.safetensors", "pt") as file:
        assert set(file.keys()) == {"weight", "features", "mean", "scale", "modality"}
        weight = file.get_tensor("weight")
    for session_id in ("full", "imaging"):
        window = one_window(trained.reader, session_id)
        own = export.source_keys(trained, window.session)
        rows = processor.rows(own)
        assert torch.equal(weight[rows], trained.table.weight[torch.from_numpy(window.sources.row)])
        np.testing.assert_array_equal(processor.units["mean"][rows].numpy(), window.sources.mean)
    assert "d1/full/cos" in keys and "d1/blind/cos" in keys and "d1/full/0" in keys


def test_the_card_names_each_session_and_licence_and_score(hub: Path, trained: Trained) -> None:
    card = (hub / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for entry in trained.store.entries:
        (line,) = [line for line in card.splitlines() if line.startswith(f"| d1 | {entry['session_id']} |")]
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[2:4] == [entry["subject_id"], str(entry["num_units"])]
        assert cells[4] == ", ".join(stream["name"] for stream in entry["streams"])
        assert cells[5] == "recording.txt" and cells[6] == (entry["licence"] or "not stated")
    assert "Licences of the recordings: CC-BY-4.0; not stated." in card and trained.store.digest() in card
    assert "(split: test)" in card and "| spikes | encoding | behavior | 0.123 | 0.500 (exact) |" in card
    assert "| spikes | forecasting | behavior | 0.123 | - |" in card
    assert "a window of 1.0 s" in card and f"({len(trained.table.keys)} sources)" in card
    assert "| - | - | - | - | - |" in export.model_card(trained, None)


def test_the_modeling_files_import_nothing_of_ours(hub: Path) -> None:
    for path in hub.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert not {name.split(".")[0] for name in names} & {"train", "prep", "deepspeed"}, path


def test_a_folder_that_is_no_hub_folder_is_left_alone(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match=r"is neither empty nor a hub folder\. Give another --hub\."):
        export.export(trained, tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_command_exports_and_replaces_an_older_export(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handmade_run(tmp_path / "run", trained.store.root, RUN)
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps({"split": "valid", "tasks": [SCORE]}))
    parser = argparse.ArgumentParser()
    export.configure(parser)
    args = parser.parse_args([str(tmp_path / "run"), "--hub", str(tmp_path / "deep" / "hub")])
    assert export.main(args) == 0
    (tmp_path / "deep" / "hub" / "old.bin").touch()
    assert export.main(args) == 0
    assert not (tmp_path / "deep" / "hub" / "old.bin").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["hub"], "nothing temporary is left"
    assert "(split: valid)" in (tmp_path / "deep" / "hub" / "README.md").read_text()
    assert "upload it with: make push HUB=" in capsys.readouterr().out


# ---------------------------------------------------------------- the processor


@pytest.mark.parametrize("session_id", ["full", "imaging", "blind", "still"])
def test_raw_arrays_and_keys_lead_to_the_same_predictions(
    trained: Trained, processor: BrainloomProcessor, session_id: str
) -> None:
    entry = next(entry for entry in trained.store.entries if entry["session_id"] == session_id)
    tasks = [task for task in TASKS if evaluate.suits(task, entry)]
    assert len(tasks) >= 3
    for task in tasks:
        window, mask = asked(trained, session_id, task)
        raw = export.raw_window(trained, window, mask)
        shown = {"pixels": raw["pixels"], "frame_time_s": raw["frame_time_s"]}
        inputs = processor(streams_of(raw), **shown, session=raw["session"].tolist())
        with torch.inference_mode():
            output = trained.model(**inputs)
        (expected,) = trained.predict([window], [mask])
        assert expected.shape == output.predictions[0].shape
        assert (output.predictions[0] - torch.from_numpy(expected)).abs().max() < 1e-5
        assert output.loss.isfinite()


ON_CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
def test_physical_inverts_the_standardisation(device: str, trained: Trained, processor: BrainloomProcessor) -> None:
    window, mask = asked(trained, "imaging", TASKS[11])
    raw = export.raw_window(trained, window, mask)
    streams = streams_of(raw)
    inputs = processor(streams)
    keys = [key for stream in streams for key in stream.keys]
    physical = processor.physical(inputs["labels"].to(device), inputs["query_source"].to(device), keys)[0].cpu()
    (pupil,) = [stream for stream in streams if stream.modality == "behavior"]
    recorded = torch.from_numpy(pupil.values[pupil.asked])
    seen = ~recorded.isnan()
    assert seen.any() and (physical[:, :3][seen] - recorded[seen]).abs().max() < 1e-5
    assert float(torch.nan_to_num(inputs["labels"]).abs().max()) < STANDARD_LIMIT
    window, mask = asked(trained, "full", TASKS[3])
    streams = streams_of(export.raw_window(trained, window, mask))
    inputs = processor(streams)
    keys = [key for stream in streams for key in stream.keys]
    counts = processor.physical(inputs["labels"], inputs["query_source"], keys)
    assert torch.equal(torch.nan_to_num(counts), torch.nan_to_num(inputs["labels"])), "counts are counts"


def test_an_unknown_key_is_named(processor: BrainloomProcessor) -> None:
    with pytest.raises(KeyError) as error:
        processor.rows(["d1/full/0", "d1/full/99", "x"])
    assert "2 of 3 sources are not in this model's unit table (first: 'd1/full/99')" in str(error.value)


Change = Callable[[Stream], dict[str, Any]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"visible": s.visible.T}, r"visible has shape \(6, 10\), expected \(10, 6\)"),
        (lambda s: {"asked": s.asked[:1]}, r"asked has shape \(1, 6\), expected \(10, 6\)"),
        (lambda s: {"keys": s.keys[:5]}, r"keys has shape \(5,\), expected \(6,\)"),
        (lambda s: {"start_s": s.start_s[:9]}, r"start_s has shape \(9,\), expected \(10,\)"),
        (lambda s: {"offset_s": np.zeros(2)}, r"offset_s has shape \(2,\), expected \(6,\)"),
        (lambda s: {"values": s.values[0]}, r"Give floats \(K, S, P\)"),
        (lambda s: {"values": np.nan_to_num(s.values, nan=255).astype(np.uint8)}, "values are uint8"),
        (lambda s: {"values": np.zeros((10, 6, 99))}, "99 samples a token; this model reads 8"),
        (lambda s: {"modality": "traces"}, "its keys are of spikes in this model's unit table"),
        (lambda s: {"modality": "spike"}, "its modality is none of spikes, traces, behavior, events"),
    ],
)
def test_a_stream_that_would_be_read_as_something_else_is_refused(
    trained: Trained, processor: BrainloomProcessor, change: Change, message: str
) -> None:
    *others, spikes = streams_of(export.raw_window(trained, *asked(trained, "full", TASKS[3])))
    assert spikes.modality == "spikes" and processor([spikes, *others])
    with pytest.raises(ValueError, match=message):
        processor([replace(spikes, **change(spikes)), *others])


def test_a_window_of_nothing_and_frames_without_times_are_refused(
    trained: Trained, processor: BrainloomProcessor
) -> None:
    raw = export.raw_window(trained, *asked(trained, "full", TASKS[0], at_s=3.0))
    with pytest.raises(ValueError, match="streams is empty"):
        processor([])
    with pytest.raises(ValueError, match=r"frame_time_s \(0,\)\. Give pixels"):
        processor(streams_of(raw), pixels=raw["pixels"])


def test_weights_may_be_loaded_in_half_precision(trained: Trained, hub: Path, processor: BrainloomProcessor) -> None:
    raw = export.raw_window(trained, *asked(trained, "full", TASKS[0]))
    inputs = processor(streams_of(raw), raw["pixels"], raw["frame_time_s"], session=raw["session"].tolist())
    half = BrainloomForPreTraining.from_pretrained(hub, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        whole, found = trained.model(**inputs), half(**inputs)
    assert next(half.parameters()).dtype == torch.bfloat16
    moved = (whole.predictions - whole.predictions.mean()).std()
    assert (found.predictions - whole.predictions).square().mean().sqrt() < 0.05 * moved


def test_the_unit_table_goes_to_the_hub_and_comes_back_from_a_folder_of_it(
    processor: BrainloomProcessor, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: dict[str, set[str]] = {}

    def push(self: BrainloomProcessor, repo_id: str, **_: Any) -> None:
        self.save_pretrained(tmp_path / "work")
        uploaded[repo_id] = {path.name for path in (tmp_path / "work").iterdir()}

    monkeypatch.setattr(BrainloomProcessor, "push_to_hub", push)
    written = processor.save_pretrained(tmp_path / "a" / "b", push_to_hub=True, repo_id="me/brain")
    files = {Path(path).name for path in written}
    assert {"units.safetensors", "unit_keys.json", "preprocessor_config.json"} <= files <= uploaded["me/brain"]
    again = BrainloomProcessor.from_pretrained(tmp_path / "a", subfolder="b")
    assert again.unit_keys == processor.unit_keys
    assert all(torch.equal(again.units[name], tensor) for name, tensor in processor.units.items())


# ---------------------------------------------------------------- the clean process


def test_a_stranger_in_a_clean_process_predicts_the_same(trained: Trained, hub: Path, tmp_path: Path) -> None:
    windows = []
    for number, (session_id, task) in enumerate(CHECKED):
        window, mask = asked(trained, session_id, task)
        assert mask.asked.any() and (mask.visible.any() or mask.frames)
        windows.append(str(tmp_path / f"window-{number}.npz"))
        raw = export.raw_window(trained, window, mask)
        np.savez(windows[-1], allow_pickle=False, expected=trained.predict([window], [mask])[0], **raw)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved_hub = shutil.copytree(hub, elsewhere / "hub")
    script = shutil.copy(clean_process.__file__, elsewhere / "check.py")
    code = (
        "import runpy, sys; check = runpy.run_path(sys.argv[1])['main']; [check(sys.argv[2], w) for w in sys.argv[3:]]"
    )
    command = [sys.executable, "-I", "-c", code, str(script), str(moved_hub), *windows]
    environment = clean_process.environment(elsewhere)
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(results) == len(CHECKED)
    for result in results:
        assert result["max_abs_difference"] < 1e-5 and result["trunk_max_abs_difference"] == 0
        assert np.isfinite(result["loss"])


def test_check_names_what_a_clean_process_could_not_do(trained: Trained, hub: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(hub, tmp_path / "hub")
    (broken / "config.json").unlink()
    window, mask = asked(trained, "full", TASKS[0])
    with pytest.raises(ExportError, match="cannot be used in a clean process:\n"):
        export.check(trained, broken, window, mask)


def test_a_clean_process_refuses_to_prove_anything_where_we_can_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prep").mkdir()
    (tmp_path / "prep" / "__init__.py").touch()
    for name in ("train", "prep"):
        monkeypatch.delitem(sys.modules, name)
    for name in ("meta_path", "path_hooks"):
        monkeypatch.setattr(sys, name, list(getattr(sys, name)))
    standard = [entry for entry in sys.path if "site-packages" in entry or "python3" in entry]
    monkeypatch.setattr(sys, "path", [*standard, str(ROOT)])
    clean_process.forget_repository()
    assert str(ROOT) not in sys.path and importlib.util.find_spec("train") is None
    monkeypatch.setattr(sys, "path", [*standard, str(tmp_path)])
    with pytest.raises(SystemExit, match="prep can still be imported: this would prove nothing"):
        clean_process.forget_repository()


def test_a_clean_process_sees_no_paths_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    environment = clean_process.environment(tmp_path)
    assert "PYTHONPATH" not in environment and environment["HF_HUB_OFFLINE"] == "1"
    assert environment["HF_HOME"].startswith(str(tmp_path))
