"""A tiny store with every awkward session, a tiny model, and ranks that train it: what the tests of train are made of.

In: a temporary folder. Out: a token store without NWB or Dask, RunConfig, models, processes that have ended.
"""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from store_builders import FRAMES_SHAPE, Pixels, SmallShards, Values, session, target, write_plan

from prep import catalog
from prep.plan import IntervalTable, PlannedStream, SessionPlan, Units
from prep.settings import TOKEN_NS
from prep.store import Store
from train import start, table_files
from train.build import build_model, model_config
from train.checkpoint import seal
from train.config import DataConfig, Family, ModelConfig, OptimConfig, RunConfig
from train.dataset import Window, WindowReader, budget, make_sample
from train.hostfile import Host
from train.launch import launch
from train.masking import Mask
from train.metrics import read_metrics
from train.model.modeling_brainloom import BrainloomForPreTraining
from train.trained import Trained
from train.unit_table import UnitTable

ROOT = Path(__file__).resolve().parent.parent
SECOND_NS = 1_000_000_000
SESSIONS = ("full", "imaging", "blind", "still")  # blind: no stimulus; still: no behaviour
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "unit_embed_size": 16,
    "samples_per_token": 8,
    "patch_size": 12,
    "latents_per_step": 2,
    "readout_hz": 20.0,
}


def tiny_run(**of_train: Any) -> RunConfig:
    """The smallest run that has everything; keywords are of its `train` section."""
    train: dict[str, Any] = {"num_steps": 10, "global_batch_size": 4, "micro_batch_size": 2, "warmup_steps": 2}
    return RunConfig(
        seed=3,
        ds_config=str(ROOT / "ds_configs" / "zero3.json"),
        checkpoint_every=5,
        log_every=100,
        model=ModelConfig(overrides=dict(TINY)),
        data=DataConfig(context_s=1.0, stride_s=0.5, max_units=8, max_queries=96, max_frames=8),
        train=OptimConfig(**{**train, **of_train}),
    )


def tiny_store(parent: Path, name: str = "tiny-store") -> Path:
    """A store of four sessions below `parent`, written once; the same bytes every time."""
    root = parent / name
    if not (root / "catalog.json").exists():
        recording = parent / "recording.txt"
        recording.write_text("stands for an NWB file")
        for number, session_id in enumerate(SESSIONS):
            plan = tiny_session(recording, session_id, number)
            write_plan(plan, target(root, plan))
        catalog.write(root)
    return root


def tiny_session(source: Path, session_id: str, number: int, begin_s: float = 12_000_000) -> SessionPlan:
    """24 s of one session: spikes with running and heading, or traces with a pupil; a movie."""
    begin_ns = round(begin_s * SECOND_NS)
    imaging, behaviour, seed = session_id == "imaging", session_id != "still", 100 * number
    offsets = np.array([0, 30_000_000, 60_000_000], np.int64)
    movie = session(source, session_id).stimuli
    streams = [_stream("dff", "trace", "traces", (240, 3, 1), seed, begin_ns, first_unit=0, offset_ns=offsets)]
    if not imaging:
        streams = [_stream("spikes", "counts", "spikes", (240, 6, 5), seed, begin_ns, first_unit=0)]
    if behaviour and imaging:
        streams.append(_stream("pupil", "trace", "behavior", (238, 1, 3), seed + 1, begin_ns, channels=("pupil",)))
    elif behaviour:
        streams.append(
            _stream("heading", "trace", "behavior", (240, 2, 5), seed + 1, begin_ns, channels=("cos", "sin"))
        )
        # a clock of its own: its tokens straddle the edges of windows
        streams.append(
            _stream("running", "trace", "behavior", (239, 1, 2), seed + 2, begin_ns + 37_000_000, channels=("v",))
        )
    if session_id != "blind":
        streams.append(
            _stream(
                "movie",
                "frames",
                "stimulus",
                (180, 1, 1),
                seed,
                begin_ns,
                channels=("screen",),
                stimulus=movie[0].digest,
            )
        )
    num_units = streams[0].spec.num_sources
    return SessionPlan(
        dataset_id="d1",
        session_id=session_id,
        subject_id=f"mouse-{number}",
        source=source,
        licence="CC-BY-4.0" if number else "",
        units=Units(
            unit_key=[f"d1/{session_id}/{i}" for i in range(num_units)],
            kind=["roi" if imaging else "unit"] * num_units,
            region=[""] * num_units,
            quality=[""] * num_units,
            xyz_um=np.full((num_units, 3), np.nan, np.float32),
        ),
        streams=tuple(streams),
        stimuli=() if session_id == "blind" else movie,
        intervals={"trials": IntervalTable(start_ns=np.zeros(0, np.int64), stop_ns=np.zeros(0, np.int64))},
        splits=tuple(
            (begin_ns + int(a * SECOND_NS), begin_ns + int(b * SECOND_NS), label)
            for a, b, label in ((0, 12, "train"), (14, 17.5, "valid"), (19.5, 24, "test"))
        ),
        coverage=(),
        findings=(),
    )


def _stream(
    name: str, kind: Any, modality: Any, shape: tuple[int, int, int], seed: int, begin_ns: int, **more: Any
) -> PlannedStream:
    offset_ns = more.pop("offset_ns", None)
    spec = SmallShards(
        name=name,
        kind=kind,
        modality=modality,
        num_tokens=shape[0],
        num_sources=shape[1],
        samples_per_token=shape[2],
        duration_ns=TOKEN_NS,
        sample_ns=TOKEN_NS // shape[2],
        **more,
    )
    start_ns = begin_ns + np.arange(shape[0], dtype=np.int64) * TOKEN_NS
    return PlannedStream(spec=spec, start_ns=start_ns, reader=Values(kind, shape, seed), offset_ns=offset_ns)


def pixels() -> Any:
    """The movie of every session (F, H, W)."""
    return Pixels().read(0, FRAMES_SHAPE[0])


def reader_of(store: Path, run: RunConfig) -> WindowReader:
    """A reader with the run's shapes."""
    return WindowReader(Store(store), model_config(run), run.data.max_frames)


def one_window(reader: WindowReader, session_id: str, at_s: float = 3.0, context_s: float = 1.0) -> Window:
    """A window of a session, `at_s` after it began."""
    ids = [entry["session_id"] for entry in reader.store.entries]
    index = ids.index(session_id)
    begin_ns = reader.store.entries[index]["splits"][0][0]
    return reader.read(index, begin_ns + round(at_s * SECOND_NS), round(context_s * SECOND_NS))


USUAL_INPUTS = 32  # of a tiny model's layers


def moved_model(run: RunConfig, seed: int = 5) -> BrainloomForPreTraining:
    """A model whose every parameter has been moved, so that no branch is silent; what sums much is moved less.

    By its name, as weights are: a new parameter leaves the others where they are. Not by more: it would predict ten
    spikes a bin, and the last digits of such a float are as large as what tests allow.
    """
    model = build_model(run)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            chance = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            size = 0.03 * min(1.0, (USUAL_INPUTS / parameter.shape[-1]) ** 0.5)
            parameter += size * torch.randn(parameter.shape, generator=chance)
    return model.eval()


def moved_trained(store: Path, run: RunConfig) -> Trained:
    """What evaluation and export get, without training: a moved model and the store's unit table."""
    reader = reader_of(store, run)
    table = UnitTable(reader.source_table.keys, model_config(run).unit_embed_size, torch.device("cpu"))
    return Trained(run, reader.store, moved_model(run), table, reader)


def batch_of(
    reader: WindowReader, run: RunConfig, family: Family, pairs: Sequence[tuple[Window, Mask]]
) -> dict[str, Any]:
    """Model arguments of windows with masks, in the shape of a family's budget; unit rows as embeddings."""
    shape = budget(reader.store, run.data, family)
    return arguments(reader, run, [make_sample(window, mask, shape) for window, mask in pairs])


def arguments(reader: WindowReader, run: RunConfig, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples as the keyword arguments of the model."""
    batch = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}
    table = UnitTable(reader.source_table.keys, model_config(run).unit_embed_size, torch.device("cpu"))
    embeds = table.lookup(batch.pop("unit_rows")).detach()
    return {"unit_embeds": embeds, **batch}


def handmade_checkpoint(folder: Path, trained: Trained, step: int = 1, num_ranks: int = 1) -> Path:
    """A sealed checkpoint of a model, as `num_ranks` ranks would have written it; the moments are zero."""
    folder.mkdir(parents=True)
    parameters = dict(trained.model.named_parameters())
    for rank in range(num_ranks):
        fragments = {}
        for name, parameter in parameters.items():
            flat = parameter.detach().flatten()
            size = -(-len(flat) // num_ranks)
            piece = flat[rank * size : (rank + 1) * size].clone()
            for kind in ("master", "exp_avg", "exp_avg_sq") if len(piece) else ():
                fragments[f"{name}|{kind}|{rank * size}"] = piece.clone() if kind == "master" else piece * 0
        save_file(fragments, folder / f"rank-{rank:05d}.safetensors")
    save_file(table_files.pack(trained.table.state(), trained.table.keys), folder / table_files.file_name(step, 0))
    shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
    position = step * trained.run.train.global_batch_size
    state = {"step": step, "position": position, "shapes": shapes, "optimizer_steps": step}
    (folder / "state.json").write_text(json.dumps(state))
    seal(folder, step)
    return folder


def handmade_run(out: Path, store: Path, run: RunConfig) -> Trained:
    """A run folder as training leaves it, of a moved model that was never trained."""
    trained = moved_trained(store, run)
    prepare_run(out, store, run)
    handmade_checkpoint(out / "checkpoints" / "step-00000001", trained)
    return trained


# ---------------------------------------------------------------- ranks


def prepare_run(out: Path, store: Path, run: RunConfig) -> Path:
    """A run folder that ranks can be started on."""
    start.prepare(run, Store(store), out)
    return out


def train_ranks(run_dir: Path, *arguments: str, slots: int = 2, command: Sequence[str] | None = None) -> int:
    """Start ranks by the launcher and wait for them; the exit code is the launcher's."""
    worker = command or [sys.executable, "-m", "train", "worker", "--out", str(run_dir)]
    return launch([Host("localhost", slots)], [*worker, *arguments], run_dir / "logs", rank_environment())


# A launcher in a process of its own, to be signalled or killed; argv: the run folder, then the command of a rank.
LAUNCHER = """
import os, sys
from pathlib import Path
from train.hostfile import Host
from train.launch import launch
sys.exit(launch([Host("localhost", 2)], sys.argv[2:], Path(sys.argv[1]) / "logs", os.environ))
"""

SEVERAL_RUNS = """
import argparse, os, sys
from pathlib import Path
import torch.distributed as dist
from train import loop
from train.network import free_port
destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None  # all runs are of one group
for run_dir in sys.argv[2:]:
    if dist.is_initialized():  # the self-check begins anew, where nothing has been said yet
        port = [free_port()]
        dist.broadcast_object_list(port)
        os.environ["MASTER_PORT"] = port[0]
    assert loop.main(argparse.Namespace(out=Path(run_dir), resume="auto")) == 0
destroy()
"""


def train_several(run_dirs: Sequence[Path], slots: int = 2) -> int:
    """Train one run after the other on the same ranks: to start them takes longer than the few steps of a tiny run."""
    command = [sys.executable, "-c", SEVERAL_RUNS, "worker", *map(str, run_dirs)]
    return train_ranks(run_dirs[0], command=command, slots=slots)


def rank_environment() -> dict[str, str]:
    """One thread a rank: sums in the same order on every machine."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def with_small_threshold(run: RunConfig, folder: Path) -> RunConfig:
    """The run under ZeRO-3 with all but its smallest parameters really partitioned."""
    mechanics = json.loads(Path(run.ds_config).read_text())
    mechanics["zero_optimization"]["stage3_param_persistence_threshold"] = 200
    (folder / "zero3.json").write_text(json.dumps(mechanics))
    return replace(run, ds_config=str(folder / "zero3.json"))


def losses(run_dir: Path) -> list[float]:
    """The loss of every step, as metrics.jsonl keeps it."""
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(len(rows)))
    return [row["loss"] for row in rows]
