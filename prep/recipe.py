"""The recipe: a YAML file that says what an NWB file leaves open, read strictly.

In: the path of a recipe, or none. Out: a frozen Recipe; every mistake in the file is an error that names its key.
"""

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

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
    """Train, valid, test: fractions of contiguous time, or explicit pieces."""

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
class Recipe:
    """What a user decides; prep/recipes/default.yaml explains each key."""

    dataset_id: str | None = None
    licence: str = ""
    angles: tuple[str, ...] = ()
    not_angles: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    series: tuple[str, ...] = ()
    names: dict[str, str] = field(default_factory=dict)
    splits: Splits = Splits()
    counts: Counts = Counts()

    def digest(self) -> str:
        """Digest of what the recipe says, however the YAML is written."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def load(path: Path | None = None) -> Recipe:
    """Read a recipe; None is the default recipe. Raises RecipeError."""
    path = path or DEFAULT_RECIPE
    content = read_yaml(path)
    if type(content.get("dataset_id")) is int:  # DANDI's names are numbers
        content["dataset_id"] = str(content["dataset_id"])
    return build(Recipe, content, str(path))
