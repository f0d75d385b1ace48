"""The configuration of a run: what is refused, in which words, and that what is saved is what ran.

In: YAML texts and overrides. Out: RunConfig, or an error that names the key.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from train_builders import ROOT, tiny_run

from prep.settings import ConfigError
from train import config
from train.build import model_config
from train.config import PRESETS, OptimConfig, deepspeed_config, gradient_accumulation, load


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "train" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_of_the_repository_loads_and_runs_on_two_ranks(path: Path, tmp_path: Path) -> None:
    run = load(path)
    assert deepspeed_config(replace(run, ds_config=str(ROOT / run.ds_config)), 2)["train_batch_size"] > 0
    run.save(tmp_path / "resolved.yaml")
    assert load(tmp_path / "resolved.yaml") == run


def test_what_is_saved_reads_back_as_it_was(tmp_path: Path) -> None:
    run = replace(tiny_run(lr=1e-5, families=("decoding",)), seed=7)
    run.save(tmp_path / "resolved.yaml")
    assert load(tmp_path / "resolved.yaml") == run
    assert load(written(tmp_path, "")) == config.RunConfig()


def test_an_override_wins_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "seed: 1\ntrain:\n  lr: 1e-3\n  num_steps: 5\n")
    run = load(
        path, ["train.num_steps=7", "data.context_s=1.5", "model.overrides.hidden_size=64", "train.families=[decoding]"]
    )
    assert (run.seed, run.train.lr, run.train.num_steps, run.data.context_s) == (1, 1e-3, 7, 1.5)
    assert load(path, ["profile_steps=10:12"]).profiled == range(10, 12) and not run.profiled
    assert run.train.families == ("decoding",) and model_config(run).hidden_size == 64
    assert model_config(run).context_s == 1.5


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("train:\n  num_step: 5\n", [], "train.num_step = 5 is not a known key. Did you mean train.num_steps?"),
        ("sead: 5\n", [], "sead = 5 is not a known key. Did you mean seed?"),
        ("", ["train.leaning_rate=1"], "train.leaning_rate = 1 is not a known key."),
        ("train:\n  lr: fast\n", [], "train.lr = 'fast' is text; expected a number."),
        (
            "train:\n  families: [dreaming]\n",
            [],
            "train.families[0] = 'dreaming': 'dreaming' is not a task family.",
        ),
        ("train:\n  families: [decoding+decodign]\n", [], "Did you mean decoding? Valid:"),
        ("train:\n  families: [decoding@0.25]\n", [], "train.families[0] = 0.25 must be a positive multiple of 0.1 s"),
        ("train:\n  families: [decoding@long]\n", [], "train.families[0] = long must be a positive multiple of 0.1 s"),
        ("train:\n  families: []\n", [], "train.families is empty. Give at least one of"),
        (
            "train:\n  context_schedule: [{from_step: 9, context_s: 1}, {from_step: 9, context_s: 2}]\n",
            [],
            "train.context_schedule has from_step [9, 9]; expected each to be more than the one before.",
        ),
        (
            "train:\n  context_schedule: [{from_step: 9, context_s: 0.25}]\n",
            [],
            "train.context_schedule[0].context_s = 0.25 must be a positive multiple of 0.1 s (one token).",
        ),
        (
            "train:\n  context_schedule: [{from_step: 0, context_s: 1}]\n",
            [],
            "train.context_schedule[0].from_step = 0 must be more than 0.",
        ),
        ("data:\n  bad_windows: ignore\n", [], "data.bad_windows = 'ignore' is text; expected one of stop, skip."),
        ("train:\n  num_steps: 0\n", [], "train.num_steps = 0 must be more than 0."),
        ("train:\n  micro_batch_size: 0\n", [], "train.micro_batch_size = 0 must be more than 0."),
        ("data:\n  stride_s: -1\n", [], "data.stride_s = -1.0 must be more than 0."),
        ("checkpoint_every: 0\n", [], "checkpoint_every = 0 must be more than 0."),
        ("seed: -1\n", [], "seed = -1 must not be negative."),
        ("validate_every: -1\n", [], "validate_every = -1 must not be negative."),
        ("validate_windows: 0\n", [], "validate_windows = 0 must be more than 0."),
        ("", ["profile_steps=12:10"], "profile_steps = '12:10' must be FIRST:STOP, for instance '10:12' for steps 10"),
        ("profile_steps: soon\n", [], "profile_steps = 'soon' must be FIRST:STOP"),
        ("log_to: [paper]\n", [], "log_to[0] = 'paper' is text; expected one of tensorboard, wandb."),
        ("data:\n  context_s: 0.25\n", [], "data.context_s = 0.25 must be a positive multiple of 0.1 s (one token)."),
        ("model:\n  preset: 2b\n", [], "model.preset = '2b' is not known. Valid: debug, 20m, 80m, 300m, 1b."),
        (
            "model:\n  overrides:\n    hiden_size: 64\n",
            [],
            "model.overrides.hiden_size = 64 is not a known key. Did you mean hidden_size?",
        ),
        (
            "model:\n  overrides:\n    context_s: 4.0\n",
            [],
            "model.overrides.context_s belongs to the data. Set data.context_s.",
        ),
        (
            "model:\n  overrides:\n    hidden_size: 100\n",
            [],
            "model.overrides: hidden_size 100 must be a multiple of 2 x num_attention_heads (4)",
        ),
        ("", ["train.num_steps"], "override 'train.num_steps' is not of the form key=value, for instance train."),
        ("", ["seed.x.y=1"], "seed = {'x': {'y': 1}} is `key: value` lines; expected a whole number."),
        ("seed: 1\n", ["seed.x=1"], "override 'seed.x=1': seed is not a section."),
    ],
)
def test_a_mistake_is_named_with_its_key_and_its_remedy(
    tmp_path: Path, text: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load(written(tmp_path, text), overrides)
    assert message in str(error.value)


def test_weights_and_a_curriculum_are_read_back_as_they_were_saved(tmp_path: Path) -> None:
    text = """
        data: {weights: {datasets: {000140: 2}, sessions: {000140/s1: 0.5}, modalities: {traces: 0}}}
        train: {context_schedule: [{from_step: 10, context_s: 2}, {from_step: 20, context_s: 4}]}
    """
    run = load(written(tmp_path, text))
    assert run.data.weights == config.Weights(
        datasets={"000140": 2.0}, sessions={"000140/s1": 0.5}, modalities={"traces": 0.0}
    )
    assert [run.turn(step).context_s for step in (0, 9, 10, 19, 20)] == [1.0, 1.0, 2.0, 2.0, 4.0]
    assert len(run.turns) == 3 * len(run.train.families)
    run.save(tmp_path / "saved.yaml")
    assert load(tmp_path / "saved.yaml") == run


def test_a_message_names_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "sead: 5\n")
    with pytest.raises(ConfigError, match=f"^{path}: sead"):
        load(path)
    with pytest.raises(ConfigError, match=r"absent\.yaml does not exist"):
        load(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    "key",
    ["train_batch_size", "gradient_clipping", "optimizer", "scheduler", "fp16", "bf16", "gradient_accumulation_steps"],
)
def test_mechanics_with_a_key_of_the_run_are_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, key: {}}))
    with pytest.raises(ConfigError, match=f"ds.json: {key} belongs to the run's YAML, not to the engine's mechanics"):
        deepspeed_config(replace(tiny_run(), ds_config=str(path)), 1)


def test_mechanics_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.json does not exist\. Valid: a file of ds_configs/"):
        deepspeed_config(replace(tiny_run(), ds_config="absent.json"), 1)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match=r"bad\.json is not valid JSON"):
        deepspeed_config(replace(tiny_run(), ds_config=str(tmp_path / "bad.json")), 1)


def test_the_batch_is_cut_into_ranks_and_micro_batches() -> None:
    train = OptimConfig(global_batch_size=12, micro_batch_size=2)
    assert [gradient_accumulation(train, ranks) for ranks in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(ConfigError) as error:
        gradient_accumulation(train, 5)
    assert str(error.value) == (
        "train.global_batch_size 12 is not a multiple of micro_batch_size x ranks (2 x 5). Change one of them."
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_model_that_can_be_configured(preset: str) -> None:
    run = replace(tiny_run(), model=config.ModelConfig(preset=preset))
    assert model_config(run).hidden_size == PRESETS[preset]["hidden_size"]
