"""Real ranks: the same losses as plain PyTorch, as one rank, and after every kind of interruption.

In: processes started by the launcher on a tiny store. Out: metrics.jsonl and checkpoints, compared for equality.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_builders import (
    LAUNCHER,
    losses,
    prepare_run,
    rank_environment,
    tiny_run,
    tiny_store,
    train_ranks,
    with_small_threshold,
)

from train import checkpoint, config, loop
from train.build import build_model, model_config
from train.checkpoint import CheckpointError
from train.config import FAMILIES, ModelConfig, RunConfig
from train.dataset import collate
from train.engine import make_optimizer
from train.exit_codes import STOPPED
from train.loader import TrainingSamples, batches
from train.metrics import read_metrics
from train.sampler import mix
from train.schedule import lr_factor
from train.trained import load_trained
from train.unit_table import UnitTable

NUM_STEPS = 20

# A rank that dies in the middle of its second save, the first after which there is something to lose.
KILLED_WHILE_SAVING = """
import contextlib, os, signal, sys
from pathlib import Path
from train import checkpoint, loop
seal = checkpoint.seal
def seal_or_die(folder, step, known):
    if step == 20:
        with contextlib.suppress(ProcessLookupError):  # it has written its part, and may have ended
            os.killpg(int(Path(sys.argv[2], "rank-1").read_text()), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    seal(folder, step, known)
checkpoint.seal = seal_or_die
Path(sys.argv[2], "rank-" + os.environ["RANK"]).write_text(str(os.getpid()))
sys.argv = ["worker", "--out", sys.argv[2]]
from train.__main__ import main
sys.exit(main(["worker", *sys.argv[1:]]))
"""

# A rank 0 that asks the launcher to stop while step 3 is under way, and waits until it has been told so itself.
STOPPED_AT_STEP_3 = """
import os, signal, sys, time
from train import loop
step_of = loop.take_step
def step_and_stop(engine, feed, per_step, step, stop_requested):
    if step == 3 and os.environ["RANK"] == "0":
        os.kill(os.getppid(), int(sys.argv[3]))
        while not stop_requested():
            time.sleep(0.01)
    return step_of(engine, feed, per_step, step, stop_requested)
loop.take_step = step_and_stop
from train.__main__ import main
sys.exit(main(["worker", "--out", sys.argv[2]]))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    tiny = tiny_run(num_steps=NUM_STEPS, average_steps=6, families=(*FAMILIES, "forecasting+decoding@0.5"))
    tiny = replace(tiny, checkpoint_every=10)
    dropping = replace(tiny, model=ModelConfig(overrides={**tiny.model.overrides, "hidden_dropout": 0.2}))
    return with_small_threshold(dropping, tmp_path_factory.mktemp("ds"))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, store: Path, run: RunConfig) -> Path:
    """Twenty steps on two ranks that nothing disturbed."""
    out = prepare_run(tmp_path_factory.mktemp("two"), store, run)
    assert train_ranks(out) == 0
    return out


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, store: Path, run: RunConfig) -> Path:
    """Twenty steps on two ranks, killed -9 during the second save."""
    out = prepare_run(tmp_path_factory.mktemp("killed"), store, run)
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, "worker", str(out)]
    assert train_ranks(out, command=command) == 128 + signal.SIGKILL
    return out


def plain_losses(store: Path, run: RunConfig, num_steps: int) -> list[float]:
    """The same training in one process, by hand: no DeepSpeed, no engine."""
    samples = TrainingSamples(store, run, model_config(run))
    model, table = build_model(run), UnitTable(_keys(samples), model_config(run).unit_embed_size, torch.device("cpu"))
    optimizer = make_optimizer(model, run.train)
    feed = batches(samples, 0, 0, 1)
    per_step = run.train.global_batch_size // run.train.micro_batch_size
    result = []
    for step in range(num_steps):
        factor, total = lr_factor(step, run.train), 0.0
        for number in range(per_step):
            torch.manual_seed(mix(run.train.micro_batch_size * (step * per_step + number), run.seed))
            batch = next(feed)
            embeds = table.lookup(batch.pop("unit_rows"))
            loss = model(unit_embeds=embeds, context_s=run.turn(step).context_s, **batch).loss / per_step
            loss.backward()
            total += float(loss.detach())
        table.exchange()
        core = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
        scale = float((run.train.clip_norm / (core.hypot(table.norm) + 1e-6)).clamp(max=1))
        for parameter in model.parameters():
            parameter.grad *= scale
        for group in optimizer.param_groups:
            group["lr"] = run.train.lr * factor
        optimizer.step()
        optimizer.zero_grad()
        table.step(run.train.unit_lr * factor, scale=scale)
        result.append(total)
    feed.close()
    return result


def _keys(samples: TrainingSamples) -> list[str]:
    samples[0]  # opens the reader
    assert samples._reader is not None
    return samples._reader.source_table.keys


def test_zero_3_on_two_ranks_is_plain_pytorch_in_one_process(two_ranks: Path, store: Path, run: RunConfig) -> None:
    plain, ranks = plain_losses(store, run, 5), losses(two_ranks)[:5]
    assert max(abs(a - b) for a, b in zip(plain, ranks, strict=True)) < 1e-5, (plain, ranks)
    assert len({round(loss, 4) for loss in plain}) > 1, "a loss that does not move would prove nothing"


@pytest.mark.slow  # for five steps, tests/test_train_validation.py shows it
def test_one_rank_has_the_losses_of_two(two_ranks: Path, store: Path, run: RunConfig, tmp_path: Path) -> None:
    out = prepare_run(tmp_path / "one", store, run)
    assert train_ranks(out, slots=1) == 0
    assert max(abs(a - b) for a, b in zip(losses(out), losses(two_ranks), strict=True)) < 1e-5


def test_half_precision_trains_like_single(store: Path, run: RunConfig, tmp_path: Path) -> None:
    """bf16 weights and activations, fp32 masters and rows: the same losses, as far as eight bits go.

    Until something has moved, to half a percent. Then Adam's first steps, which go by the sign of a gradient, carry two
    runs apart that differ by a rounding, by up to 7 % of a loss in six steps at full rate, whatever the model. So the
    rate grows all the way here.
    """
    warm = replace(run, train=replace(run.train, warmup_steps=NUM_STEPS))
    out = prepare_run(tmp_path / "half", store, replace(warm, train=replace(warm.train, precision="bf16")))
    assert train_ranks(out) == 0
    exact, rounded, first = plain_losses(store, warm, NUM_STEPS), losses(out), len(run.train.families)
    assert sum(exact) != sum(rounded)
    assert abs(sum(exact) - sum(rounded)) < 0.01 * sum(exact), "of all twenty steps together"
    exact, rounded = exact[:first], rounded[:first]
    assert abs(exact[0] - rounded[0]) < 0.005 * abs(exact[0])
    assert max(abs(a - b) for a, b in zip(exact, rounded, strict=True)) < 0.01 * max(map(abs, exact))
    assert {parameter.dtype for parameter in load_trained(out).model.parameters()} == {torch.float32}, "the masters"


def test_parameters_are_really_partitioned_and_put_together_again(two_ranks: Path, store: Path) -> None:
    found, passed_over = checkpoint.newest(two_ranks / "checkpoints")
    assert found is not None and not passed_over and found.step == NUM_STEPS
    keys = [key for fragments in found.manifest["fragments"].values() for key in fragments]
    assert {key.split("|")[1] for key in keys} == {"master", "average", "exp_avg", "exp_avg_sq"}
    assert len(found.manifest["fragments"]) == 2 and any(not key.endswith("|0") for key in keys)
    trained = load_trained(two_ranks)
    assert {name: tuple(p.shape) for name, p in trained.model.named_parameters()} == {
        name: tuple(shape) for name, shape in found.state()["shapes"].items()
    }
    fresh = dict(build_model(trained.run).named_parameters())
    assert sum(not torch.equal(p, fresh[name]) for name, p in trained.model.named_parameters()) > 20


def test_the_average_of_the_weights_is_what_is_evaluated(two_ranks: Path) -> None:
    trained, (found, _) = load_trained(two_ranks), checkpoint.newest(two_ranks / "checkpoints")
    assert found is not None and found.has_average
    for name, parameter in trained.model.named_parameters():
        size = parameter.numel()
        assert torch.equal(parameter.flatten(), found.parameter(name, "average", 0, size))
    rows, keys = found.table()
    held = [trained.table.keys.index(key) for key in keys]
    assert len(held) > 10 and torch.equal(trained.table.weight[held], rows["average"])
    moved = found.parameter("model.latent_embed", "master", 0, 8) - found.parameter(
        "model.latent_embed", "average", 0, 8
    )
    assert moved.any() and not torch.equal(rows["average"], rows["weight"])


def test_a_run_writes_down_what_it_was(two_ranks: Path, run: RunConfig, store: Path) -> None:
    assert config.load(two_ranks / "config.yaml") == run
    environment = json.loads((two_ranks / "environment.json").read_text())
    assert environment["world_size"] == 2 and len(environment["store_digest"]) == 64
    assert environment["num_parameters_core"] == sum(p.numel() for p in build_model(run).parameters())
    resolved = json.loads((two_ranks / "ds_config.json").read_text())
    assert (resolved["train_batch_size"], resolved["gradient_accumulation_steps"]) == (4, 1)
    rows = read_metrics(two_ranks)
    assert [row["family"] for row in rows[: len(run.train.families)]] == list(run.train.families)
    assert all(row["tokens_per_s"] > 0 and 0 <= row["data_wait_share"] <= 1 for row in rows)
    found, _ = checkpoint.newest(two_ranks / "checkpoints")
    assert found is not None and found.state()["position"] == NUM_STEPS * run.train.global_batch_size
    assert {p.name for p in (two_ranks / "checkpoints").iterdir()} == {"step-00000010", "step-00000020"}


def test_no_file_of_a_run_is_a_pickle(two_ranks: Path) -> None:
    kinds = set()
    for path in (path for path in two_ranks.rglob("*") if path.is_file()):
        begin = path.read_bytes()[:4]
        assert begin[:1] != b"\x80" and begin != b"PK\x03\x04", f"{path} is a pickle, or a zip that holds one"
        kinds.add(path.suffix)
    written = [path for path in (two_ranks / "checkpoints").rglob("*") if path.is_file()]
    assert {path.suffix for path in written} == {".safetensors", ".json"}
    assert {".yaml", ".jsonl", ".log"} <= kinds


def test_ranks_see_different_modalities_in_one_step_and_do_not_hang(
    two_ranks: Path, store: Path, run: RunConfig
) -> None:
    samples = TrainingSamples(store, run, model_config(run))
    frames, behaviour = set(), set()
    for step in range(NUM_STEPS):
        ranks = [collate([samples[4 * step + 2 * rank + i] for i in range(2)]) for rank in range(2)]
        frames.add(tuple(bool(batch["frame_mask"].any()) for batch in ranks))
        behaviour.add(tuple(bool((batch["source_modality"] == 2).any()) for batch in ranks))
    assert {(True, False), (False, True)} & frames
    assert len(losses(two_ranks)) == NUM_STEPS


def test_a_rank_without_behaviour_or_stimulus_does_not_hang_the_other(store: Path, run: RunConfig) -> None:
    """Every branch runs for every batch: each parameter gets a gradient, whatever the batch lacks."""
    samples = TrainingSamples(store, run, model_config(run))
    model = build_model(run)
    for position in range(4 * len(run.train.families)):
        batch = collate([samples[position]])
        embeds = torch.zeros(*batch.pop("unit_rows").shape, model_config(run).unit_embed_size)
        model(unit_embeds=embeds, **batch).loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()), position
        model.zero_grad()


def test_kill_9_during_a_save_leaves_the_sealed_checkpoint_before(killed: Path) -> None:
    folders = {path.name for path in (killed / "checkpoints").iterdir()}
    assert folders == {"step-00000010", ".step-00000020.partial"}
    found, passed_over = checkpoint.newest(killed / "checkpoints")
    assert found is not None and found.step == 10 and not passed_over


def test_ten_steps_and_kill_9_and_a_resume_and_ten_are_twenty_to_the_last_bit(
    killed: Path, two_ranks: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(killed, tmp_path / "resumed", ignore=shutil.ignore_patterns("tensorboard"))
    assert train_ranks(out, "--resume", "must") == 0
    assert "resuming from" in (out / "logs" / "rank-00000.log").read_text()
    assert losses(out) == losses(two_ranks)
    ours, theirs = (checkpoint.newest(path / "checkpoints")[0] for path in (out, two_ranks))
    assert ours is not None and theirs is not None
    for name, file in theirs.manifest["files"].items():
        if name.endswith(".safetensors"):
            assert ours.manifest["files"][name] == file, name


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_to_the_launcher_saves_and_the_run_goes_on_identically(
    two_ranks: Path, store: Path, run: RunConfig, tmp_path: Path, number: signal.Signals
) -> None:
    out = prepare_run(tmp_path / "stopped", store, run)
    worker = [sys.executable, "-c", STOPPED_AT_STEP_3, "worker", str(out), str(int(number))]
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, str(out), *worker], env=rank_environment(), capture_output=True
    )
    assert done.returncode == STOPPED, done.stderr.decode()
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000004"]
    log = (out / "logs" / "rank-00000.log").read_text()
    assert "asked to stop: saved step 4; the same command goes on from there" in log
    assert train_ranks(out) == 0
    assert losses(out) == losses(two_ranks)


def test_resume_must_without_a_checkpoint_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "newest_of_all_ranks", checkpoint.newest)
    with pytest.raises(CheckpointError, match=r"has no sealed checkpoint, and --resume must was given. Check OUT"):
        loop._resume(None, tmp_path, "must", None, None)


def test_a_run_that_is_there_does_not_become_another_model(two_ranks: Path, store: Path, run: RunConfig) -> None:
    other = config.load(two_ranks / "config.yaml", ["model.overrides.hidden_size=64"])
    with pytest.raises(config.ConfigError, match="holds a run of another model"):
        prepare_run(two_ranks, store, other)


def test_a_step_may_take_longer_where_its_graph_is_compiled(run: RunConfig) -> None:
    """A run by `train.compile` was ended in its second step, whose family had no graph yet."""
    usual = run.faults.watchdog_s
    first = loop.patience_s(run, 0, set())
    assert first > usual and loop.patience_s(run, 1, {run.turn(0)}) == usual
    compiled = replace(run, train=replace(run.train, compile=True))
    assert run.turn(0) != run.turn(1)
    assert loop.patience_s(compiled, 1, {run.turn(0)}) == first
    assert loop.patience_s(compiled, 1, {run.turn(0), run.turn(1)}) == usual


def test_no_rank_leaves_a_process_behind(two_ranks: Path) -> None:
    mine = str(two_ranks).encode()
    others = [path for path in Path("/proc").glob("[0-9]*/cmdline") if path.parent.name != str(os.getpid())]
    assert not [path for path in others if path.exists() and mine in path.read_bytes()]
