"""What prep and train share: the store's constants, the conversion of time, and strict YAML into dataclasses.

In: YAML files. Out: constants (FORMAT.md), int64 nanoseconds, frozen dataclasses or an error that names the key.
"""

import difflib
import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt
import yaml

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

FORMAT_VERSION = 2
FEATURES_VERSION = 2

Kind = Literal["counts", "trace", "frames", "event"]
Modality = Literal["spikes", "traces", "behavior", "stimulus"]
MODALITIES: tuple[Modality, ...] = ("spikes", "traces", "behavior", "stimulus")
ACTIVITY: tuple[Modality, ...] = ("spikes", "traces")
SPLITS = ("train", "valid", "test")

BIN_NS = 20_000_000  # one sample of a `counts` stream
TOKEN_NS = 100_000_000  # what a token lasts, about, on a regular clock
COUNT_MISSING = 255
COUNT_MAX = 254
NO_TIME = np.iinfo(np.int64).min  # an interval's time that the file leaves out

# Per-unit features (U, 28): the train split and what is known about the unit; see FORMAT.md, "Features".
STREAM_FEATURES = (
    "log_rate",
    "cv",
    "fano_token",
    "autocorr_sample",
    "autocorr_token",
    "skewness",
    "population_coupling",
)
SPIKE_FEATURES = ("cv_isi", "burst_index")
UNIT_KINDS = ("unit", "roi", "lfp", "fiber")
QUALITIES = ("good", "mua", "noise")
REGIONS = (
    "visual",
    "motor",
    "somatosensory",
    "cortex",
    "hippocampus",
    "thalamus",
    "striatum",
    "midbrain",
    "elsewhere",
)
FEATURE_NAMES = (
    *STREAM_FEATURES,
    *SPIKE_FEATURES,
    "log_waveform_ms",
    "depth_mm",
    "has_depth",
    *(f"is_{kind}" for kind in UNIT_KINDS),
    *(f"quality_{quality}" for quality in QUALITIES),
    *(f"region_{region}" for region in REGIONS),
)

# Fields of a token of kind `event`, in order; NaN = not given. FORMAT.md, "Events".
EVENT_FIELDS = ("duration_s", "value")
STIMULUS_FIELDS = (
    "duration_s",
    "orientation_deg",
    "spatial_frequency_cpd",
    "temporal_frequency_hz",
    "phase_cycles",
    "contrast",
    "x_deg",
    "y_deg",
    "width_deg",
    "height_deg",
    "luminance",
    "opacity",
    "frame",
    "tone_hz",
    "level",
)


BLOCK_TIMES = 2**16  # converted at once: the temporaries stay in the cache
FARTHEST_S = 9e9  # from zero, in either direction: what int64 nanoseconds hold, 285 years


def to_ns(seconds: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Seconds (float64, any shape, finite) to int64 nanoseconds.

    The whole second is split off first: at 1.2e7 s the product t * 1e9 no longer fits float64's 53 bits.
    """
    time_s = np.asarray(seconds, dtype=np.float64)
    result = np.empty(time_s.shape, np.int64)
    flat_s, flat_ns = time_s.reshape(-1), result.reshape(-1)
    for first in range(0, len(flat_s), BLOCK_TIMES):
        block_s = flat_s[first : first + BLOCK_TIMES]
        whole = np.floor(block_s)
        block_ns = whole.astype(np.int64) * 1_000_000_000
        flat_ns[first : first + BLOCK_TIMES] = block_ns + np.rint((block_s - whole) * 1e9).astype(np.int64)
    return result


class ConfigError(ValueError):
    """A YAML file or an override is wrong; the message names file, dotted key, value and remedy."""


class _StrictLoader(yaml.SafeLoader):
    """The scalars of JSON, and all else is text: 000140, 20190801_1, NO and 12:30:00 are strings, 3e-4 is a number."""


_StrictLoader.yaml_implicit_resolvers = {}  # PyYAML's own are YAML 1.1's: octal, sexagesimal, yes and no
for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:null", r"^(?:null|~|)$", ["n", "~", ""]),
    ("tag:yaml.org,2002:bool", r"^(?:true|false)$", list("tf")),
    ("tag:yaml.org,2002:int", r"^-?(?:0|[1-9][0-9]*)$", list("-0123456789")),
    ("tag:yaml.org,2002:float", r"^-?(?:0|[1-9][0-9]*)(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?$", list("-0123456789")),
):
    _StrictLoader.add_implicit_resolver(_tag, re.compile(_pattern), _first)


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, Any]:
    keys = [str(loader.construct_object(key)) for key, _ in node.value]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise ConfigError(f"line {node.start_mark.line + 1}: {sorted(twice)} given twice. Keep one of them.")
    values = [loader.construct_object(value, deep=True) for _, value in node.value]
    return dict(zip(keys, values, strict=True))


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; duplicate keys and anything but a mapping are errors."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist. Check the path.") from error
    except (yaml.YAMLError, ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable as YAML: {error}") from error
    if not isinstance(content, dict | None):
        raise ConfigError(f"{path} holds {_kind_of(content)}; expected `key: value` lines.")
    return content or {}


class _StrictDumper(yaml.SafeDumper):
    """Writes what _StrictLoader reads: a text that looks like a number is quoted."""


_StrictDumper.yaml_implicit_resolvers = _StrictLoader.yaml_implicit_resolvers


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    """Write a mapping that `read_yaml` reads back as it was; keys keep their order."""
    path.write_text(yaml.dump(content, Dumper=_StrictDumper, sort_keys=False, allow_unicode=True), encoding="utf-8")


def parse_value(text: str) -> Any:
    """The value of a `key=value` override, by the same rules as in a file."""
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{text!r} is not readable as a YAML value: {' '.join(str(error).split())}") from error


def build(cls: type[T], content: dict[str, Any], where: str, prefix: str = "") -> T:
    """A frozen dataclass from a mapping, its parts as annotated; `where` names the file in errors."""
    hints = get_type_hints(cls)
    for key in content:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"Did you mean {prefix}{near[0]}?" if near else f"Valid here: {', '.join(sorted(hints))}."
            raise ConfigError(f"{where}: {prefix}{key} = {content[key]!r} is not a known key. {hint}")
    values = {key: _convert(hints[key], value, where, f"{prefix}{key}") for key, value in content.items()}
    required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        raise ConfigError(f"{where}: {prefix}{missing[0]} is missing. Add it.")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {prefix}{error}") from error


_IN_WORDS = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    tuple: "a list",
    list: "a list",
    dict: "`key: value` lines",
    type(None): "empty",
}


def _convert(hint: Any, value: Any, where: str, key: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where, key)
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return build(hint, value, where, f"{key}.")
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(arguments[0], item, where, f"{key}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {str(k): _convert(arguments[1], item, where, f"{key}.{k}") for k, item in value.items()}
    if hint is Any:
        return value
    if hint is float and type(value) in (int, float):
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise ConfigError(f"{where}: {key} = {value!r} is {_kind_of(value)}; expected {_expected(hint)}.")


def _kind_of(value: Any) -> str:
    return _IN_WORDS.get(type(value), type(value).__name__)


def _expected(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    return _IN_WORDS[dict] if is_dataclass(hint) else _IN_WORDS.get(get_origin(hint) or hint, str(hint))
