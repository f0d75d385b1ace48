"""Brainloom on one recording, the way a user goes: ingest, train, export, and ask the hub folder.

In: a recording's file, a fold, a run's YAML. Out: the hub folder; one checkpoint's predictions of the protocol's tasks.

What may be seen is cut from the recording's own times, exactly: bins and frames lie wholly inside of what the protocol
admits, and the hub folder is given nothing else.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from bench.science import protocol
from bench.science.recordings import SPLITS, Recording

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
BIN_S, BINS_PER_TOKEN = protocol.BIN_S, 5
TOKEN_S = BIN_S * BINS_PER_TOKEN
FRAMES_PER_TOKEN = 3
BATCH = 256
# Windows of a heading: their length, and where in them the second lies that is seen; chosen on the valid blocks.
HEADING_WINDOW_S = {"hd_acausal": (1.0, 0.0), "hd_causal": (2.0, 0.5)}
SEEN_S = {"hd_acausal": -0.5, "hd_causal": -1.0, "cosmooth": -0.5, "forecast": -protocol.FORECAST_PAST_S}
RUNS = {"head_direction_A2929": "head_direction.yaml", "miniscope_A0634": "miniscope.yaml"}
TASKS = {
    "head_direction_A2929": ("hd_acausal", "hd_causal", "cosmooth", "forecast"),
    "miniscope_A0634": ("forecast_ca",),
}


def call(*arguments: str | Path, **environment: str) -> None:
    """One command of the project; what it printed is in the error when it fails."""
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )


def recipe(recording: Recording, fold: int | None) -> dict[str, Any]:
    """The recording's recipe with the blocks of a split; only what the protocol asks about."""
    blocks = recording.blocks(fold)
    explicit = [
        {"label": split, "start_s": float(start), "stop_s": float(stop)}
        for split in SPLITS
        for start, stop in blocks[split]
    ]
    heading = "acquisition/CompassDirection"
    of_heading = {
        "angles": [f"{heading}/ry"],
        "names": {f"{heading}/ry": "head_direction"},
        "exclude": [f"{heading}/rx", f"{heading}/rz", "acquisition/Position", "acquisition/sleep_ripples"],
    }
    return {"dataset_id": "science", **(of_heading if recording.heading.size else {}), "splits": {"explicit": explicit}}


def train(file: Path, recording: Recording, fold: int | None, folder: Path, overrides: tuple[str, ...] = ()) -> Path:
    """Ingest the file, train on its train blocks alone, export; returns the hub folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(recording, fold)))
    store, out, hosts, hub = (folder / name for name in ("store", "run", "hostfile", "hub"))
    call("prep", "ingest", file, "--out", store, "--recipe", folder / "recipe.yaml", "--workers", "1")
    call("train", "hostfile", "--nodes", "localhost", "--slots", "1", "--out", hosts)
    run = HERE / RUNS[recording.name]
    call("train", "train", "--config", run, "--store", store, "--out", out, "--hostfile", hosts, *overrides)
    call("train", "export", out, "--hub", hub)
    return hub


@dataclass
class Hub:
    """A hub folder, loaded by transformers as anybody would."""

    model: Any
    processor: Any

    @classmethod
    def load(cls, folder: Path) -> "Hub":
        """Model and processor, by their auto classes."""
        from transformers import AutoFeatureExtractor, AutoModelForPreTraining

        model = AutoModelForPreTraining.from_pretrained(folder, trust_remote_code=True).eval()
        return cls(model, AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True))

    def keys(self, modality: int) -> list[str]:
        """Keys of the sources of a modality, in the order of the recording."""
        return [
            key
            for key, own in zip(self.processor.unit_keys, self.processor.units["modality"], strict=True)
            if own == modality
        ]

    def stream(self, keys: list[str], modality: str, values: np.ndarray, start_s: np.ndarray, **more: Any) -> Any:
        """A Stream of the processor; `seen` says which token times are visible, the others are asked."""
        module = sys.modules[type(self.processor).__module__]
        seen = np.repeat(more["seen"][:, None], len(keys), 1)
        return module.Stream(
            keys=keys,
            modality=modality,
            values=values,
            start_s=start_s,
            sample_s=more["sample_s"],
            visible=seen,
            asked=~seen,
        )

    def ask(self, windows: list[list[Any]], context_s: float) -> np.ndarray:
        """Expected values (window, query, P) in the recording's units, of windows of one shape."""
        said = []
        for first in range(0, len(windows), BATCH):
            inputs = [self.processor(streams) for streams in windows[first : first + BATCH]]
            batch = {name: torch.cat([each[name] for each in inputs]) for name in inputs[0]}
            del batch["labels"], batch["label_mask"]
            keys = [key for stream in windows[first] for key in stream.keys]
            with torch.inference_mode():
                predictions = self.model(**batch, context_s=context_s).predictions
            said.append(self.processor.physical(predictions, batch["query_source"], keys).numpy())
        return np.concatenate(said)


def predict(hub: Hub, recording: Recording, task: str, time: np.ndarray) -> protocol.Prediction:
    """The prediction file's arrays for query times."""
    if task == "forecast_ca":
        return {"t0": time, "pred": _forecast_frames(hub, recording, time)}
    if task == "forecast":
        return {"t0": time, "rate": _forecast(hub, recording, time)}
    if task == "cosmooth":
        units = np.array(protocol.held_out(recording))
        return {"t": time, "rate": _cosmooth(hub, recording, time), "unit": units, "bin_s": np.array(BIN_S)}
    cos, sin = _heading(hub, recording, task, time).T
    return {"t": time, "angle": np.arctan2(sin, cos)}


def _seen(recording: Recording, task: str, time: np.ndarray, num_tokens: int) -> np.ndarray:
    """(windows, tokens, units, bins) spikes from where the task may begin to see."""
    edges = SEEN_S[task] + BIN_S * np.arange(num_tokens * BINS_PER_TOKEN + 1)
    counts = [np.diff(np.searchsorted(spikes, time[:, None] + edges), axis=1) for spikes in recording.spike_times]
    split = np.stack(counts, 1).astype(np.float32).reshape(len(time), recording.num_units, num_tokens, BINS_PER_TOKEN)
    return split.transpose(0, 2, 1, 3)


def _heading(hub: Hub, recording: Recording, task: str, time: np.ndarray) -> np.ndarray:
    """(windows, 2): cos and sin at `time`."""
    channels = hub.keys(2)
    if [key.rsplit("/", 1)[1] for key in channels] != ["cos", "sin"]:
        raise RuntimeError(f"the hub folder has the channels {channels}; expected the heading's cos and sin alone")
    context_s, first_s = HEADING_WINDOW_S[task]
    start_s, yes = first_s + TOKEN_S * np.arange(10), np.ones(10, bool)
    at = np.array([first_s - SEEN_S[task]])
    nothing = np.full((1, 2, 1), np.nan, np.float32)
    asked = hub.stream(channels, "behavior", nothing, at, sample_s=BIN_S, seen=np.zeros(1, bool))
    windows = [
        [hub.stream(hub.keys(0), "spikes", seen, start_s, sample_s=BIN_S, seen=yes), asked]
        for seen in _seen(recording, task, time, 10)
    ]
    return hub.ask(windows, context_s)[:, :, 0]


def _cosmooth(hub: Hub, recording: Recording, time: np.ndarray) -> np.ndarray:
    """(windows, held-out units): expected spikes in the bin around `time`."""
    keys, hidden = hub.keys(0), protocol.held_out(recording)
    others = [unit for unit in range(recording.num_units) if unit not in hidden]
    nothing = np.full((1, len(hidden), 1), np.nan, np.float32)
    at = np.array([-SEEN_S["cosmooth"] - BIN_S / 2])
    asked = hub.stream([keys[u] for u in hidden], "spikes", nothing, at, sample_s=BIN_S, seen=np.zeros(1, bool))
    start_s, yes = TOKEN_S * np.arange(10), np.ones(10, bool)
    windows = [
        [hub.stream([keys[u] for u in others], "spikes", seen[:, others], start_s, sample_s=BIN_S, seen=yes), asked]
        for seen in _seen(recording, "cosmooth", time, 10)
    ]
    return hub.ask(windows, 1.0)[:, :, 0]


def _forecast(hub: Hub, recording: Recording, time: np.ndarray) -> np.ndarray:
    """(windows, 25, units): expected spikes in each bin of the half second to come."""
    past = _seen(recording, "forecast", time, 15)
    values = np.concatenate([past, np.full((len(time), 5, *past.shape[2:]), np.nan, np.float32)], 1)
    start_s, seen = TOKEN_S * np.arange(20), np.arange(20) < 15
    windows = [[hub.stream(hub.keys(0), "spikes", each, start_s, sample_s=BIN_S, seen=seen)] for each in values]
    said = hub.ask(windows, 2.0)[..., :BINS_PER_TOKEN].reshape(len(time), 5, recording.num_units, BINS_PER_TOKEN)
    return said.transpose(0, 1, 3, 2).reshape(len(time), protocol.NUM_BINS, recording.num_units)


def _forecast_frames(hub: Hub, recording: Recording, time: np.ndarray) -> np.ndarray:
    """(windows, 15, ROIs): the frames to come; the last seen frame stands at `time`."""
    period_s = float(np.median(np.diff(recording.trace_time)))
    num_past, num = protocol.PAST_FRAMES // FRAMES_PER_TOKEN, protocol.NUM_FRAMES // FRAMES_PER_TOKEN
    last, num_rois = np.searchsorted(recording.trace_time, time), recording.traces.shape[1]
    past = recording.traces[last[:, None] + np.arange(1 - protocol.PAST_FRAMES, 1)].astype(np.float32)
    past = past.reshape(len(time), num_past, FRAMES_PER_TOKEN, num_rois).transpose(0, 1, 3, 2)
    values = np.concatenate([past, np.full((len(time), num, *past.shape[2:]), np.nan, np.float32)], 1)
    start_s, seen = period_s * FRAMES_PER_TOKEN * np.arange(num_past + num), np.arange(num_past + num) < num_past
    windows = [[hub.stream(hub.keys(1), "traces", each, start_s, sample_s=period_s, seen=seen)] for each in values]
    said = hub.ask(windows, 2.0)[..., :FRAMES_PER_TOKEN].reshape(len(time), num, num_rois, FRAMES_PER_TOKEN)
    return said.transpose(0, 1, 3, 2).reshape(len(time), protocol.NUM_FRAMES, num_rois)
