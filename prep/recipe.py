"""The recipe: a YAML file that says what an NWB file leaves open, read strictly.

In: the path of a recipe, or none. Out: a frozen Recipe; every mistake in the file is an error that names its key.
"""

import hashlib
import itertools
import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from prep.asset_files import with_digests
from prep.settings import BIN_NS, SPLITS, ConfigError, build, read_yaml

DEFAULT_RECIPE = Path(__file__).parent / "recipes" / "default.yaml"
RecipeError = ConfigError


@dataclass(frozen=True, kw_only=True)
class Span:
    """One explicit piece of a split, [start_s, stop_s) on the session clock."""

    label: str
    start_s: float
    stop_s: float

    def __post_init__(self) -> None:
        if self.label not in SPLITS:
            raise RecipeError(f"label = {self.label!r}; expected one of {', '.join(SPLITS)}.")
        if not self.start_s < self.stop_s:
            raise RecipeError(f"stop_s = {self.stop_s}; expected more than start_s = {self.start_s}.")


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Train, valid, test: of contiguous time, of trials, of whole sessions or subjects, of stimuli; or explicit pieces.

    By session, subject, trial or stimulus the label is drawn from a digest of the name, so that it never changes when
    others join; `assign` overrides it for the names that it lists.
    """

    by: Literal["time", "trial", "session", "subject", "stimulus"] = "time"
    table: str | None = None  # interval table whose rows are split, by trial and by stimulus; None: trials
    column: str | None = None  # by stimulus: the column that names the stimulus
    assign: dict[str, str] = field(default_factory=dict)  # name of a session, subject, stimulus: label
    fractions: tuple[float, ...] = (0.7, 0.1, 0.2)
    gap_s: float = 2.0
    reference: str | None = None  # name or object path of the stream whose time is split; None: activity
    explicit: tuple[Span, ...] = ()

    def __post_init__(self) -> None:
        parts = self.fractions
        if len(parts) != 3 or not min(parts) >= 0 or not abs(sum(parts) - 1) < 1e-9:
            raise RecipeError(f"fractions = {list(parts)}; expected three (train, valid, test) that add up to 1.")
        if not self.gap_s >= 0:
            raise RecipeError(f"gap_s = {self.gap_s}; expected zero or more seconds.")
        wrong = {name: label for name, label in self.assign.items() if label not in SPLITS}
        if wrong:
            raise RecipeError(f"assign = {wrong}; expected labels among {', '.join(SPLITS)}.")
        if self.explicit and self.by != "time":
            raise RecipeError(f"by = {self.by!r} beside explicit pieces; expected one of the two.")
        ordered = sorted(self.explicit, key=lambda span: span.start_s)
        for before, after in itertools.pairwise(ordered):
            if after.start_s < before.stop_s:
                pieces = f"{before.label} until {before.stop_s} s and {after.label} from {after.start_s} s"
                raise RecipeError(f"explicit has {pieces}; expected pieces that do not overlap.")


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How spikes are counted."""

    bin_ms: int = BIN_NS // 1_000_000

    def __post_init__(self) -> None:
        if self.bin_ms != BIN_NS // 1_000_000:
            raise RecipeError(f"bin_ms = {self.bin_ms}; expected 20, the only width of store version 1.")


@dataclass(frozen=True, kw_only=True)
class Lfp:
    """Band-limited power of ElectricalSeries."""

    series: tuple[str, ...] = ()  # which to read; none by default
    bands_hz: tuple[tuple[float, ...], ...] = ((4.0, 8.0), (8.0, 13.0), (13.0, 30.0), (30.0, 80.0))
    rate_hz: float = 50.0

    def __post_init__(self) -> None:
        for band in self.bands_hz:
            if len(band) != 2 or not 0 < band[0] < band[1]:
                raise RecipeError(f"bands_hz has {list(band)}; expected [low, high] with 0 < low < high.")
        if not 1 <= self.rate_hz <= 1000:
            raise RecipeError(f"rate_hz = {self.rate_hz}; expected 1 to 1000 Hz.")


@dataclass(frozen=True, kw_only=True)
class Signals:
    """Plain TimeSeries, one per unit, that belong together: acquisition/Activity_* becomes the stream `activity`."""

    pattern: str
    name: str
    region: str = ""


@dataclass(frozen=True, kw_only=True)
class Asset:
    """Stimulus pixels outside the NWB file."""

    match: str  # name or hash of the stimulus as the tables give it; * and ? match as in a shell
    file: str  # png, npy or mp4, relative to the recipe's folder; {name} stands for what matched
    rate_hz: float | None = None  # frames per second of a film; None: what the file says
    sha256: str = ""  # of the content; set on loading


@dataclass(frozen=True, kw_only=True)
class Sync:
    """Two records of the same pulses: of the session's clock, and of another clock that some streams are on."""

    reference: str
    pulses: str
    streams: tuple[str, ...] = ()  # objects whose times are on the other clock and are mapped; none: only reported


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a user decides; prep/recipes/default.yaml explains each key."""

    dataset_id: str | None = None
    licence: str = ""
    angles: tuple[str, ...] = ()
    not_angles: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    series: tuple[str, ...] = ()
    names: dict[str, str] = field(default_factory=dict)
    units: tuple[str, ...] = ()
    keep_units: dict[str, tuple[str, ...]] = field(default_factory=dict)
    events: tuple[str, ...] = ()
    not_events: tuple[str, ...] = ()
    stimulus_tables: tuple[str, ...] = ()
    lfp: Lfp = Lfp()
    signals: tuple[Signals, ...] = ()
    assets: tuple[Asset, ...] = ()
    sync: tuple[Sync, ...] = ()
    join: str | None = None
    splits: Splits = Splits()
    counts: Counts = Counts()
    folder: Path = field(default=Path(), compare=False)  # where assets are looked for; set on loading

    def __post_init__(self) -> None:
        if self.join is not None:
            _check_pattern(self.join)

    def digest(self) -> str:
        """Digest of what the recipe says, however the YAML is written."""
        content = {key: value for key, value in asdict(self).items() if key != "folder"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_pattern(pattern: str) -> None:
    try:
        num_groups = re.compile(pattern).groups
    except re.error as error:
        raise RecipeError(f"join = {pattern!r} is no regular expression ({error}).") from error
    if num_groups != 1:
        raise RecipeError(
            f"join = {pattern!r} has {num_groups} groups; expected one, around what the files of a session share."
        )


def load(path: Path | None = None) -> Recipe:
    """Read a recipe; None is the default recipe. Raises RecipeError."""
    path = path or DEFAULT_RECIPE
    content = read_yaml(path)
    if type(content.get("dataset_id")) is int:  # DANDI's names are numbers
        content["dataset_id"] = str(content["dataset_id"])
    if "folder" in content:
        raise RecipeError(f"{path}: folder = {content['folder']!r} is not a known key. Assets lie beside the recipe.")
    recipe = build(Recipe, content, str(path))
    try:
        return replace(recipe, folder=path.parent.resolve(), assets=with_digests(recipe.assets, path.parent))
    except ConfigError as error:
        raise RecipeError(f"{path}: {error}") from error
