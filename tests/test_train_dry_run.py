"""The dry run: its plan of the largest preset, what it refuses, what it takes from a person.

In: the configurations of the repository, a tiny store. Out: text, JSON, exit codes.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest
from train_builders import ROOT, tiny_run, tiny_store

from prep.settings import ConfigError
from train import dry_run
from train.__main__ import main
from train.config import PRESETS, load
from train.flops import parameters
from train.loader import TrainingSamples
from train.memory import MOMENTS
from train.plan import plan_of, samples_of
from train.plan_table import summary
from train.traffic import Machine, laptop

CONFIGS = sorted((ROOT / "train" / "configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ds_configs are."""
    monkeypatch.chdir(ROOT)


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    assert main(["dry-run", *arguments]) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(said(capsys, *arguments, "--json", code=code)[0])
    return content


def test_the_largest_preset_on_the_target_machine(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = said(capsys, "--config", "train/configs/1b.yaml", "--nodes", "8", "--slots", "8")
    assert "1b on 8 x 8 GPUs, ds_configs/zero3.json, bf16; a step: 2,048 windows = 64 ranks x 2 x 16" in out and not err
    for expected in (
        r"trunk +974,948,992 ",
        r"unit table +384,000,000 +\(1,000,000 rows of 384\)",
        r"master weights +GPU +0\.066 +0\.066 +0\.066",
        r"activations kept +GPU +3\d\.\d{3} *\n",
        r"a GPU at the worst moment, with 5% of slack +[56]\d\.\d{3}",
        r"gradients, scattered +2\.28 +2 ",
        r"rows of the unit table, and back +0\.404 +1 ",
        r"weights, gathered after the step +0\.000481 +1 .* 160 +0\.02",
        r"\n2 +16 +8 +6\d\.\d .* to .* 9\d%\n4 +32 +4 .*\n8 +64 +2 ",
        r"100,000 steps: 0\.2\d+ to 0\.3\d+ days",
        r"One pass through 1,000 hours of recording \(7,200,000 windows\): 3,515\.6 steps, ",
        r"Assumed: 989 TFLOP/s x 40%, 360 GB/s in a node, 40 GB/s out of it for each GPU; 1\.9 and 4 us a message",
    ):
        assert re.search(expected, out), expected
    assert all(len(line) <= 160 for line in out.splitlines())


def test_json_has_every_number_of_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    plan = as_json(capsys, "--config", "train/configs/20m.yaml", "--nodes", "2", "--slots", "2", "--units", "5000")
    run = load(ROOT / "train" / "configs" / "20m.yaml")
    assert plan["parameters"] == parameters(dry_run.job_of(run, 2, 2, 0, True).config)
    sizes = [sum(part[m] for part in plan["memory_bytes"] if part["place"] == "device") for m in MOMENTS]
    assert plan["device_gib"] == pytest.approx(max(sizes) * 1.05 / 2**30 + 2.5)
    assert plan["unit_rows"] == 5000 and plan["shortage"] == ""
    assert plan["days"][0] == pytest.approx(plan["pace"]["bounds_s"][0] * run.train.num_steps / 86_400)
    assert [scale["nodes"] for scale in plan["scaling"]] == [1, 2], "64 windows cannot be shared among 8 ranks"
    assert plan["scaling"][1]["high_s"] == plan["pace"]["bounds_s"][1]
    rings = [exchange for exchange in plan["exchanges"] if exchange["group"] == "all"]
    assert rings and all(x["intra_bytes"] == x["inter_bytes"] for x in rings), "of two ranks, one sends out of the node"


def test_a_store_says_how_large_windows_are_and_how_many(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    store, run = tiny_store(tmp_path), tiny_run()
    run.save(tmp_path / "run.yaml")
    plan = as_json(capsys, "--config", str(tmp_path / "run.yaml"), "--store", str(store), "--device", "cpu")
    samples = TrainingSamples(store, run, dry_run.job_of(run, 1, 1, 0, False).config)
    assert plan["recordings"]["num_windows"] == samples.order.num_tickets()
    assert plan["recordings"]["unit_hours"] == pytest.approx((3 * 6 + 3) * 12 / 3600), "12 s of 6, 3, 6 and 6 units"
    assert plan["unit_rows"] == 3 * 6 + 3 + 4 + 4 + 4, "and channels, sessions and their subjects"
    most = max(size.num_inputs + size.num_queries for size in samples.budgets.values())
    assert 0 < plan["tokens_per_step"] <= run.train.global_batch_size * most
    out, _ = said(capsys, "--config", str(tmp_path / "run.yaml"), "--store", str(store), "--device", "cpu")
    assert re.search(r"One pass through the store \(\d+ windows, 0\.1 unit-hours\)", out)
    assert "on 1 x 1 CPU ranks" in out


def test_a_run_that_does_not_fit_is_refused_with_its_parts_and_with_what_would(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, err = said(capsys, "--config", "train/configs/300m.yaml", "--memory-gib", "28", code=2)
    assert "activations kept" in out, "the plan is shown all the same"
    assert (
        err.startswith("train dry-run: train/configs/300m.yaml does not fit on 1 x 1: a GPU needs ")
        and "and has 28.0 (activations kept 9.4, batches of a step 5.8, activations for a while 5.1," in err
    )
    assert "What would fit: " in err and "train.micro_batch_size=8" in err


def test_each_way_out_fits(tmp_path: Path) -> None:
    """Offloading where states are too large, smaller micro-batches and more nodes where a GPU is too small."""
    for path in (ROOT / "ds_configs").glob("*.json"):
        shutil.copy(path, tmp_path)
    mechanics = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    mechanics["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    (tmp_path / "offload.json").write_text(json.dumps(mechanics))
    overrides = ["train.global_batch_size=128", "train.micro_batch_size=2", f"ds_config={tmp_path}/zero3.json"]
    run = load(ROOT / "train" / "configs" / "1b.yaml", overrides)
    job = dry_run.job_of(run, 1, 1, 1000, True)
    plan = plan_of(job, Machine(memory_gib=24, host_memory_gib=10_000), *samples_of(run, None))
    assert "moments of Adam" in plan.shortage
    ways = [*dry_run.ways_out(plan)]
    assert f"ds_config={tmp_path}/offload.json" in ways and any(re.fullmatch(r"\d+ nodes", way) for way in ways)
    for way in ways:
        nodes = int(way.split()[0]) if way.endswith("nodes") else 1
        better = run if way.endswith("nodes") else load(ROOT / "train" / "configs" / "1b.yaml", [*overrides, way])
        other = dry_run.job_of(better, nodes, 1, 1000, True)
        assert not plan_of(other, plan.machine, plan.samples, plan.recordings).shortage, way


def test_a_host_that_is_too_small_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "measured.json").write_text('{"host_memory_gib": 10}')
    _, err = said(
        capsys,
        *("--config", "train/configs/1b.yaml", "--nodes", "8", "--slots", "8"),
        *("--measured", str(tmp_path / "measured.json")),
        code=2,
    )
    assert "a node needs " in err and " GiB of memory, and has 10.0 (batches read ahead " in err


def test_what_was_measured_takes_the_place_of_what_is_assumed_and_the_command_line_that_of_both(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "measured.json").write_text('{"mfu": 0.5, "bandwidth_inter": 20}')
    options = ["--measured", str(tmp_path / "measured.json"), "--bandwidth-inter", "10", "--peak-tflops", "100"]
    machine = as_json(capsys, "--config", "train/configs/80m.yaml", *options)["machine"]
    assert (machine["mfu"], machine["bandwidth_inter"], machine["peak_tflops"]) == (0.5, 10, 100)
    own = as_json(capsys, "--config", "train/configs/80m.yaml", "peak_tflops=312")["machine"]
    assert own["peak_tflops"] == 312 and own["mfu"] == Machine().mfu


def test_a_hostfile_says_on_how_many_ranks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("gpu-1 slots=2\ngpu-2 slots=2\n")
    plan = as_json(capsys, "--config", "train/configs/20m.yaml", "--hostfile", str(tmp_path / "hostfile"))
    assert (plan["nodes"], plan["slots"]) == (2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "0"], "--nodes 0 --slots 1: both must be at least 1."),
        (["--slots", "7"], "train.global_batch_size 128 is not a multiple of micro_batch_size x ranks (32 x 7)."),
        (["--measured", "no.json"], "--measured no.json cannot be read ("),
        (["--measured", "measured.json"], "measured.json: mfo = 1 is not a known key. Did you mean mfu?"),
        (["--mfu", "0"], "mfu = 0.0 must be more than 0."),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "measured.json").write_text('{"mfo": 1}')
    placed = [str(tmp_path / x) if x == "measured.json" else x for x in arguments]
    _, err = said(capsys, "--config", "train/configs/20m.yaml", *placed, code=2)
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("typed", "passed"),
    [
        ([], ""),
        (["NODES=8", "SLOTS=4"], '--nodes "$NODES" --slots "$SLOTS"'),
        (["HOSTFILE=hostfiles/x", "STORE=a b"], '--store "$STORE" --hostfile "$HOSTFILE"'),
    ],
    ids=str,
)
def test_make_passes_on_what_was_typed_and_no_default(typed: list[str], passed: str) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in ("STORE", "HOSTFILE", "NODES", "SLOTS")}
    words = ["make", "-ns", "-o", ".venv/installed", "dry-run", *typed]
    printed = subprocess.run(words, cwd=ROOT, env=clean, capture_output=True, text=True, check=True).stdout
    assert printed.split() == f'.venv/bin/python -m train dry-run --config "$RUN" {passed}'.split()


def test_a_machine_without_a_gpu_is_this_one() -> None:
    args = argparse.Namespace(device="cpu", measured=None, **dict.fromkeys(dry_run.OF_THE_MACHINE))
    machine = dry_run.machine_of(args, tiny_run())
    assert machine.memory_gib == machine.host_memory_gib > 0.1
    with pytest.raises(ConfigError, match="is not a multiple of micro_batch_size x ranks"):
        dry_run.job_of(tiny_run(), 3, 1, 0, False)


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_header_of_a_preset_says_what_it_is_for_and_what_it_needs(path: Path) -> None:
    """Numbers in the header are those of the plan; what to write there is in the message."""
    comment = [line[2:] for line in path.read_text().splitlines() if line.startswith("# ")]
    text = re.sub(r"\s+", " ", " ".join(comment))
    assert text.startswith(f"{path.stem}: ") and "Hardware: " in text
    if path.stem not in PRESETS:
        return
    run = load(path)
    assert run.model.preset == path.stem
    assert f"make train RUN=train/configs/{path.name} STORE=store OUT=runs/{path.stem}" in text
    command = rf"make dry-run RUN=train/configs/{path.name} NODES=(\d+) SLOTS=(\d+)( ARGS=\"--device cpu\")?"
    found = re.search(rf"By formula \({command}\), with everything", text)
    assert found is not None
    job = dry_run.job_of(run, int(found[1]), int(found[2]), dry_run.ROWS, not found[3])
    plan = plan_of(job, laptop(1e3) if found[3] else Machine(), *samples_of(run, None))
    expected = summary(plan)
    assert not plan.shortage and expected in text, "the header should say:\n" + textwrap.indent(
        "\n".join(textwrap.wrap(expected, 112)), "#   "
    )


def test_every_preset_has_its_configuration() -> None:
    assert set(PRESETS) <= {path.stem for path in CONFIGS}
