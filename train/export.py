"""From a checkpoint to a hub folder: safetensors, configuration, modeling files, units by key, model card.

In: a run folder. Out: a folder that `AutoModelForPreTraining.from_pretrained(…, trust_remote_code=True)` loads
anywhere, proven in a clean process that cannot import this repository.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from train import clean_process
from train.dataset import Window
from train.masking import Mask
from train.modalities import MODALITIES
from train.model.modeling_brainloom import BrainloomForPreTraining
from train.model.processing_brainloom import SESSION, BrainloomProcessor
from train.sources import CHANNELED, token_streams
from train.trained import Trained, load_trained

Array = npt.NDArray[Any]
disable_progress_bar()  # of reading and writing files that take milliseconds


class ExportError(ValueError):
    """An export cannot be made or does not predict what the trained model predicts."""


def export(trained: Trained, hub: Path, evaluation: dict[str, Any] | None) -> None:
    """Write the hub folder, whole or not at all."""
    if hub.exists() and any(hub.iterdir()) and not (hub / "config.json").exists():
        raise ExportError(f"{hub} is neither empty nor a hub folder. Give another --hub.")
    with tempfile.TemporaryDirectory(dir=hub.parent, prefix=f".{hub.name}.") as temporary:
        folder = Path(temporary) / "hub"
        # transformers registers the class that is saved; the trunk alone is to be had from the same files
        trained.model.config.auto_map = {"AutoModel": "modeling_brainloom.BrainloomModel"}
        trained.model.save_pretrained(folder)
        processor(trained).save_pretrained(folder)
        (folder / "README.md").write_text(model_card(trained, evaluation))
        for path in folder.iterdir():
            path.chmod(0o644)  # a hub folder is made to be shared; safetensors writes for the owner alone
        shutil.rmtree(hub, ignore_errors=True)
        folder.rename(hub)


def processor(trained: Trained) -> BrainloomProcessor:
    """The processor with a row for every source of the store."""
    config = trained.model.config
    made = BrainloomProcessor(config.samples_per_token, (config.image_size[0], config.image_size[1]))
    keys: list[str] = []
    known: set[str] = set()  # of earlier sessions: those of a subject share its row
    columns: dict[str, list[Tensor]] = {name: [] for name in ("weight", "features", "mean", "scale", "modality")}
    for session in range(len(trained.store.entries)):
        sources = trained.reader.sources(session)
        own = source_keys(trained, session)
        new = np.array([place for place, key in enumerate(own) if key not in known], np.int64)
        keys += [own[place] for place in new]
        known |= set(own)
        columns["weight"].append(trained.table.weight[torch.from_numpy(sources.row[new])])
        for name in ("features", "mean", "scale", "modality"):
            columns[name].append(torch.from_numpy(getattr(sources, name)[new]))
    return made.with_units(keys, {name: torch.cat(parts).contiguous() for name, parts in columns.items()})


def source_keys(trained: Trained, session: int) -> list[str]:
    """Keys of a session's sources, in the reader's order: units, channels (dataset/session/channel), origins."""
    entry, opened = trained.store.entries[session], trained.store.session(session)
    units = opened.text("units/unit_key") if entry["num_units"] else []
    keys, sources = [], trained.reader.sources(session)
    for number, stream in token_streams(entry):
        first = stream["first_unit"]
        if first is not None:
            keys += units[first : first + stream["num_sources"]]
        elif stream["modality"] in CHANNELED:
            channels = [stream["channels"][place] for place in sources.place[sources.stream == number]]
            keys += [f"{entry['dataset_id']}/{entry['session_id']}/{channel}" for channel in channels]
    return keys + list(trained.reader.source_table.origins(entry))


def model_card(trained: Trained, evaluation: dict[str, Any] | None) -> str:
    """README.md of the hub folder: what it is, how to use it, what it was trained on and under which licences."""
    config = trained.model.config
    core = sum(parameter.numel() for parameter in trained.model.parameters())
    licences = sorted({entry["licence"] or "not stated" for entry in trained.store.entries})
    rows = [
        f"| {entry['dataset_id']} | {entry['session_id']} | {entry['subject_id'] or '-'} | {entry['num_units']} | "
        f"{', '.join(s['name'] for s in entry['streams'])} | {', '.join(s['file'] for s in entry['sources'])} | "
        f"{entry['licence'] or 'not stated'} |"
        for entry in trained.store.entries
    ]
    scores = []
    for row in (evaluation or {}).get("tasks", []):
        explained = "-" if row["deviance_explained"] is None else f"{row['deviance_explained']:.3f}"
        ceiling = "-" if row["ceiling"] is None else f"{row['ceiling']:.3f} ({row['ceiling_kind']})"
        scores.append(f"| {row['modality']} | {row['task']} | {', '.join(row['visible'])} | {explained} | {ceiling} |")
    return CARD.format(
        core=core,
        units=trained.table.weight.numel(),
        num_rows=len(trained.table.keys),
        context_s=config.context_s,
        licences="; ".join(licences),
        sessions="\n".join(rows),
        split=(evaluation or {}).get("split", "none"),
        scores="\n".join(scores) or "| - | - | - | - | - |",
        store_digest=trained.store.digest(),
    )


CARD = """---
library_name: transformers
tags:
- neuroscience
- brainloom
---

# Brainloom

A transformer over neuronal activity, stimulus and behaviour, trained from NWB recordings. It predicts what is hidden
of a window of {context_s} s from what is visible: activity from stimulus and behaviour (encoding), behaviour from
activity (decoding), units from other units (co-smoothing), the future from the past (forecasting).

{core:,} core parameters; {units:,} in the unit table ({num_rows} sources).

## Use

```python
from transformers import AutoFeatureExtractor, AutoModelForPreTraining

model = AutoModelForPreTraining.from_pretrained("this/repository", trust_remote_code=True).eval()
processor = AutoFeatureExtractor.from_pretrained("this/repository", trust_remote_code=True)
```

`processor(streams=[…])` takes raw arrays and unit keys (see `Stream` in `processing_brainloom.py`) and returns the
model's arguments; `processor.physical(…)` turns predictions back into the recording's units. Sessions and subjects that
the model has seen may have rows as well: `processor(streams, session=["DATASET/session:ID", "DATASET/subject:ID"])`
uses those it knows; without them it predicts as for a session that it has never seen.

## Trained on

Licences of the recordings: {licences}. Store digest: `{store_digest}`.

| dataset | session | subject | units | streams | file | licence |
|---|---|---|---|---|---|---|
{sessions}

## Held-out deviance explained (split: {split})

D2 for counts of spikes and events, R2 over the train mean for traces and behaviour.

| modality | task | visible | explained | ceiling |
|---|---|---|---|---|
{scores}
"""


def raw_window(trained: Trained, window: Window, mask: Mask) -> dict[str, Array]:
    """A window as an outsider has it: raw arrays, times and keys; nothing of this project's objects."""
    entry, session = trained.store.entries[window.session], trained.store.session(window.session)
    keys = source_keys(trained, window.session)
    arrays: dict[str, Array] = {"pixels": window.pixels if mask.frames else window.pixels[:0]}
    arrays["session"] = np.array([keys[i] for i in np.flatnonzero(window.sources.modality == SESSION)], np.str_)
    arrays["frame_time_s"] = window.frame_time_s if mask.frames else window.frame_time_s[:0]
    number = 0
    for place, stream in token_streams(entry):
        own = np.flatnonzero(window.sources.stream == place)
        tokens = np.isin(window.tokens.source, own)
        if not tokens.any():
            continue
        opened = session.stream(stream["name"])
        start_ns = np.unique(window.token_ns[tokens])
        shape = len(start_ns), len(own)
        if stream["kind"] == "event":
            values = window.labels[tokens][:, : stream["samples_per_token"]].reshape(*shape, -1)
        else:
            begin = opened.tokens(int(start_ns[0]), int(start_ns[-1]) + 1)
            values = opened.read(begin).astype(np.float32)
            values[values == 255] = np.nan if stream["kind"] == "counts" else 255
        arrays |= {
            f"keys_{number}": np.array([keys[i] for i in own]),
            f"modality_{number}": np.array(stream["modality"]),
            f"values_{number}": values,
            f"start_s_{number}": (start_ns - window.start_ns) / 1e9,
            f"sample_s_{number}": np.array(stream["sample_ns"] / 1e9),
            f"offset_s_{number}": np.zeros(shape[1]) if opened.offset_ns is None else opened.offset_ns / 1e9,
            f"visible_{number}": mask.visible[tokens].reshape(shape),
            f"asked_{number}": mask.asked[tokens].reshape(shape),
        }
        number += 1
    return {**arrays, "num_streams": np.array(number)}


def check(trained: Trained, hub: Path, window: Window, mask: Mask) -> float:
    """Reload in a clean process in another folder and predict a window; returns the largest absolute difference."""
    expected = trained.predict([window], [mask])[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        np.savez(folder / "window.npz", allow_pickle=False, **raw_window(trained, window, mask), expected=expected)
        script = shutil.copy(clean_process.__file__, folder / "check.py")
        command = [sys.executable, "-I", str(script), str(hub.resolve()), str(folder / "window.npz")]
        done = subprocess.run(
            command, cwd=folder, env=clean_process.environment(folder), capture_output=True, text=True
        )
    if done.returncode:
        raise ExportError(f"{hub} cannot be used in a clean process:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["max_abs_difference"])


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m train export`."""
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--hub", type=Path, required=True, help="folder to write")


def main(args: argparse.Namespace) -> int:
    """Export the newest checkpoint."""
    trained = load_trained(args.run_dir)
    scores = args.run_dir / "evaluation.json"
    args.hub.parent.mkdir(parents=True, exist_ok=True)
    export(trained, args.hub, json.loads(scores.read_text()) if scores.exists() else None)
    again = BrainloomForPreTraining.from_pretrained(args.hub)
    different = [n for n, p in again.state_dict().items() if not torch.equal(p, trained.model.state_dict()[n])]
    if different:
        raise ExportError(f"{args.hub} does not hold the trained weights: {different[:3]} differ.")
    print(f"{args.hub}: {', '.join(sorted(path.name for path in args.hub.iterdir()))}")
    print(f"modalities: {', '.join(MODALITIES)}; upload it with: make push HUB={args.hub} REPO=org/name")
    return 0
