"""The configuration of a run: one YAML file, `key=value` overrides, frozen dataclasses.

In: train/configs/*.yaml. Out: RunConfig, whose resolved form is saved with the run.
"""

import difflib
import inspect
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from prep.settings import MODALITIES, ConfigError, build, parse_value, read_yaml, write_yaml

Board = Literal["tensorboard", "wandb"]
Family = Literal["co_smoothing", "forecasting", "encoding", "decoding", "inpainting", "leave_out"]
MAX_WEIGHT = 1000.0  # of a window in one pass
FAMILIES: tuple[Family, ...] = ("co_smoothing", "forecasting", "encoding", "decoding", "inpainting")
ALL_FAMILIES: tuple[Family, ...] = (*FAMILIES, "leave_out")


@dataclass(frozen=True)
class Turn:
    """What one step trains: a mix of families, for instance co_smoothing+decoding, in windows of one length."""

    mix: str
    context_s: float


# Layers, width, heads, inner width, unit row: the trunk has about 12 * width^2 parameters a layer. Rows are wide:
# each kind of features is read by a third of one, and thirds of 21 numbers held readouts back (CONTRIBUTING.md).
PRESETS: dict[str, dict[str, Any]] = {
    "debug": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 344,
        "unit_embed_size": 192,
    },
    "20m": {
        "hidden_size": 384,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "intermediate_size": 1024,
        "unit_embed_size": 192,
    },
    "80m": {
        "hidden_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
        "intermediate_size": 2048,
        "unit_embed_size": 192,
    },
    "300m": {
        "hidden_size": 1024,
        "num_hidden_layers": 22,
        "num_attention_heads": 16,
        "intermediate_size": 2816,
        "unit_embed_size": 384,
    },
    "1b": {
        "hidden_size": 1792,
        "num_hidden_layers": 25,
        "num_attention_heads": 14,
        "intermediate_size": 4864,
        "unit_embed_size": 384,
    },
}


def _check_overrides(preset: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Refuse what the model would swallow without a word, and say what it refuses as a person's mistake."""
    from train.model.configuration_brainloom import BrainloomConfig  # seconds: only where there is something to check

    valid = [name for name in inspect.signature(BrainloomConfig).parameters if name not in ("context_s", "kwargs")]
    for key, value in overrides.items():
        if key == "context_s":
            raise ConfigError("overrides.context_s belongs to the data. Set data.context_s.")
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Valid here: {', '.join(sorted(valid))}."
            raise ConfigError(f"overrides.{key} = {value!r} is not a known key. {hint}")
    try:
        BrainloomConfig(**{**preset, **overrides})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"overrides: {error}") from error


def _check_positive(section: Any, *names: str) -> None:
    for name in names:
        if getattr(section, name) <= 0:
            raise ConfigError(f"{name} = {getattr(section, name)} must be more than 0.")


def _check_turn(where: str, text: str) -> None:
    mix, at, seconds = text.partition("@")
    for family in mix.split("+"):
        if family not in ALL_FAMILIES:
            near = difflib.get_close_matches(family, ALL_FAMILIES, n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"{where} = {text!r}: {family!r} is not a task family. {hint}Valid: {', '.join(ALL_FAMILIES)}, "
                "or a mix such as co_smoothing+decoding, each with or without a length of its windows, such as @2.0."
            )
    if at:
        _check_context(where, parse_value(seconds))


def _check_context(where: str, context_s: Any) -> None:
    number = isinstance(context_s, int | float)
    if not number or context_s <= 0 or abs(context_s * 10 - round(context_s * 10)) > 1e-9:
        raise ConfigError(f"{where} = {context_s} must be a positive multiple of 0.1 s (one token).")


def _check_schedule(train: "OptimConfig") -> None:
    if train.decay_steps and train.schedule != "wsd":
        raise ConfigError(
            f"decay_steps = {train.decay_steps} is of schedule wsd, and this is {train.schedule}. Set schedule=wsd."
        )
    if not 0 <= train.decay_steps <= train.num_steps:
        raise ConfigError(f"decay_steps = {train.decay_steps} must lie between 0 and num_steps = {train.num_steps}.")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model: a preset, and what differs from it (keys of BrainloomConfig)."""

    preset: str = "debug"
    overrides: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ConfigError(f"preset = {self.preset!r} is not known. Valid: {', '.join(PRESETS)}.")
        if self.overrides:
            _check_overrides(PRESETS[self.preset], self.overrides)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How often windows come in one pass: the product of the weights of their dataset, session and its modalities."""

    datasets: dict[str, float] = field(default_factory=dict)  # dataset_id: weight; 1 where nothing is said
    sessions: dict[str, float] = field(default_factory=dict)  # dataset_id/session_id: weight
    modalities: dict[str, float] = field(default_factory=dict)  # spikes, traces, …: weight of sessions that have it
    families: dict[str, dict[str, float]] = field(default_factory=dict)  # mix of train.families: its own `modalities`

    def __post_init__(self) -> None:
        of_mixes = {f"families.{mix}": weights for mix, weights in self.families.items()}
        for what, weights in ({"modalities": self.modalities} | of_mixes).items():
            for name in sorted(weights.keys() - set(MODALITIES)):
                near = difflib.get_close_matches(name, MODALITIES, n=1)
                hint = f"Did you mean {near[0]}?" if near else f"Valid: {', '.join(MODALITIES)}."
                raise ConfigError(f"{what}: {name!r} is not a modality. {hint}")
        everything = {"datasets": self.datasets, "sessions": self.sessions, "modalities": self.modalities} | of_mixes
        for what, weights in everything.items():
            for name, weight in weights.items():
                if not 0 <= weight <= MAX_WEIGHT:
                    raise ConfigError(f"{what}.{name} = {weight} must be between 0 and {MAX_WEIGHT:g}.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a sample is."""

    context_s: float = 1.0
    stride_s: float = 0.5  # between two windows of the train split; each is moved by up to this much
    max_units: int = 64  # units of a window in training, drawn by the sample's own seed
    max_queries: int = 2048  # hidden tokens that are predicted in training, drawn likewise
    max_frames: int = 32
    num_workers: int = 0  # loader processes per rank; 0 = a thread
    bad_windows: Literal["stop", "skip"] = "stop"  # damaged ones: end the run, or train on nothing in their place
    weights: Weights = field(default_factory=Weights)  # by default each window comes once in a pass

    def __post_init__(self) -> None:
        _check_context("context_s", self.context_s)
        _check_positive(self, "stride_s", "max_units", "max_queries", "max_frames")


@dataclass(frozen=True, kw_only=True)
class ContextFrom:
    """A stage of the curriculum: from a step on, windows last so long."""

    from_step: int
    context_s: float

    def __post_init__(self) -> None:
        _check_positive(self, "from_step")
        _check_context("context_s", self.context_s)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How the parameters move."""

    num_steps: int = 100
    global_batch_size: int = 32
    micro_batch_size: int = 16
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: matrices by Muon, all else by AdamW (train/muon.py)
    lr: float = 1e-3
    vector_lr_scale: float = 1.0  # of norms, biases and embeddings: their learning rate is lr times this
    unit_lr: float = 0.1
    weight_decay: float = 0.01
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = 20
    decay_steps: int = 0  # under wsd (warm-up, stable, decay): how many of the last steps decay
    final_lr_fraction: float = 0.05
    clip_norm: float = 1.0
    average_steps: int = 0  # horizon of the running average of all weights that is evaluated and exported; 0 = none
    unit_dropout: float = 0.1  # how often the row of a unit, a session, a subject is absent in training
    families: tuple[str, ...] = FAMILIES  # in turn, one a step: FAMILY[+FAMILY …][@SECONDS], by default data.context_s
    context_schedule: tuple[ContextFrom, ...] = ()  # a curriculum; until its first stage data.context_s
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False  # by torch.compile: the model as one graph, under ZeRO-3 the inside of each block
    activation_checkpointing: bool = False  # compute activations again in the backward pass instead of keeping them

    def __post_init__(self) -> None:
        _check_positive(self, "num_steps", "global_batch_size", "micro_batch_size", "clip_norm")
        steps = [stage.from_step for stage in self.context_schedule]
        if steps != sorted(set(steps)):
            raise ConfigError(f"context_schedule has from_step {steps}; expected each to be more than the one before.")
        _check_schedule(self)
        if not self.families:
            raise ConfigError(f"families is empty. Give at least one of {list(ALL_FAMILIES)}.")
        for number, text in enumerate(self.families):
            _check_turn(f"families[{number}]", text)


@dataclass(frozen=True, kw_only=True)
class FaultConfig:
    """What is put up with, and what ends the run."""

    watchdog_s: float = 120.0  # how long a phase of a step may last; five times as long in the first one of its kind
    max_bad_steps: int = 5  # skipped one after the other, because loss or gradient was not finite
    spike_factor: float = 0.0  # a loss this many mean distances from its turn's median above it is high; 0 = none is
    spike_steps: int = 8  # in a row, until a spike is undone: weights go back to the checkpoint before, the data go on

    def __post_init__(self) -> None:
        _check_positive(self, "watchdog_s", "max_bad_steps", "spike_steps")
        if self.spike_factor < 0:
            raise ConfigError(f"spike_factor = {self.spike_factor} must not be negative.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run."""

    seed: int = 0
    ds_config: str = "ds_configs/zero3.json"
    checkpoint_every: int = 50
    keep_checkpoints: int = 2  # the newest; and for ever:
    keep_every: int = 0  # those of every so many steps; 0 = none
    log_every: int = 10
    log_to: tuple[Board, ...] = ("tensorboard",)  # beside metrics.jsonl
    validate_every: int = 500  # steps, and at the end: scores on fixed windows of the valid split; 0 = never
    validate_windows: int = 2  # of each session
    profile_steps: str = ""  # FIRST:STOP are traced by torch.profiler; the operations of step STOP are counted
    peak_tflops: float = 0.0  # what one device can do, for the MFU; 0 = as the data sheet of a known GPU says
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: OptimConfig = field(default_factory=OptimConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)

    def __post_init__(self) -> None:
        for name in ("seed", "validate_every", "peak_tflops"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} = {getattr(self, name)} must not be negative.")
        _check_positive(self, "checkpoint_every", "keep_checkpoints", "log_every", "validate_windows")
        mixes = dict.fromkeys(turn.mix for turn in self.turns)
        for mix in self.data.weights.families.keys() - mixes.keys():
            raise ConfigError(f"data.weights.families: {mix!r} is not in train.families. It has {', '.join(mixes)}.")
        if self.profile_steps and not (re.fullmatch(r"\d+:\d+", self.profile_steps) and self.profiled):
            raise ConfigError(
                f"profile_steps = {self.profile_steps!r} must be FIRST:STOP, for instance '10:12' for steps 10 and 11."
            )

    @property
    def profiled(self) -> range:
        """The steps that are traced; none by default."""
        first, _, stop = self.profile_steps.partition(":")
        return range(int(first or 0), int(stop or 0))

    def turn(self, step: int) -> Turn:
        """What an optimizer step trains: a function of the step alone, the same on all ranks."""
        begun_s = [stage.context_s for stage in self.train.context_schedule if stage.from_step <= step]
        return _turn(
            self.train.families[step % len(self.train.families)], begun_s[-1] if begun_s else self.data.context_s
        )

    @property
    def turns(self) -> list[Turn]:
        """All that is trained in turn, in all stages of the curriculum."""
        lengths_s = [self.data.context_s, *(stage.context_s for stage in self.train.context_schedule)]
        return list(dict.fromkeys(_turn(text, context_s) for context_s in lengths_s for text in self.train.families))

    def as_dict(self) -> dict[str, Any]:
        """The resolved configuration, as YAML and JSON have it."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content

    def save(self, path: Path) -> None:
        """Write the resolved configuration as YAML."""
        write_yaml(path, self.as_dict())


def _turn(text: str, context_s: float) -> Turn:
    mix, _, seconds = text.partition("@")
    return Turn(mix, float(seconds) if seconds else context_s)


def load(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Defaults, then the file, then `a.b=value` overrides; the first mistake is a ConfigError."""
    content = read_yaml(path)
    for override in overrides or []:
        key, found, text = override.partition("=")
        if not found:
            raise ConfigError(f"override {override!r} is not of the form key=value, for instance train.num_steps=100.")
        _set(content, key.split("."), parse_value(text), override)
    return build(RunConfig, content, str(path))


def _set(content: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        content = content.setdefault(key, {})
        if not isinstance(content, dict):
            raise ConfigError(f"override {override!r}: {key} is not a section.")
    content[keys[-1]] = value


def gradient_accumulation(config: OptimConfig, world_size: int) -> int:
    """Micro-batches per rank and step that make up the global batch."""
    per_pass = config.micro_batch_size * world_size
    if config.global_batch_size % per_pass:
        raise ConfigError(
            f"train.global_batch_size {config.global_batch_size} is not a multiple of micro_batch_size x ranks "
            f"({config.micro_batch_size} x {world_size}). Change one of them."
        )
    return config.global_batch_size // per_pass


NEVER_IN_MECHANICS = ("optimizer", "scheduler", "fp16", "compile", "activation_checkpointing")


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The resolved DeepSpeed JSON: mechanics from the file, everything else from the run's YAML."""
    path = Path(config.ds_config)
    try:
        mechanics: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"ds_config = {config.ds_config} does not exist. Valid: a file of ds_configs/.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    per_node = min(mechanics.get("zero_optimization", {}).get("zero_hpz_partition_size", 1), world_size)
    if world_size % per_node:
        raise ConfigError(f"{path}: zero_hpz_partition_size {per_node} does not divide {world_size} ranks. Change it.")
    ours = {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation(config.train, world_size),
        "gradient_clipping": config.train.clip_norm,
        "bf16": {"enabled": config.train.precision == "bf16"},
    }
    for key in {*ours, *NEVER_IN_MECHANICS} & set(mechanics):
        raise ConfigError(f"{path}: {key} belongs to the run's YAML, not to the engine's mechanics. Remove it there.")
    if config.train.optimizer == "muon":
        if mechanics.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none":
            raise ConfigError(
                f"{path} keeps the optimizer's states off the GPU, where train.optimizer=muon would be slow. "
                "Use a file of ds_configs/ without offload, or train.optimizer=adamw."
            )
        ours["zero_allow_untested_optimizer"] = True  # DeepSpeed knows its own Muon alone, which clips what has moved
    return {**mechanics, **ours}
