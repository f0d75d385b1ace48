"""One vocabulary for what tables say was shown, whatever the columns are called: quantities, names, types.

In: columns of an interval table. Out: settings.STIMULUS_FIELDS (N, P) in one set of units, names, a type for each row.
"""

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.nwb.inventory import snake_case
from prep.settings import STIMULUS_FIELDS

Column = npt.NDArray[Any] | list[str]  # (N,) or (N, k) numbers, or N strings
Floats = npt.NDArray[np.float64]

BLANK = "blank"
NOTHING = {"", "-1", "nan", "none", "null", "n/a", "na", "omitted", "omission", "blank", "gray", "grey"}
# The side of a stimulus where a table says left or right alone: the 35 degrees of azimuth of the International Brain
# Laboratory's task (2021, eLife 10:e63711), whose tables have such columns.
SIDE_DEG = {"left": -35.0, "right": 35.0}

# Own names of columns for one quantity, after prefix and unit are taken off; of several the first that is given counts.
QUANTITIES: dict[str, tuple[str, ...]] = {
    "orientation": ("orientation", "ori", "direction"),
    "spatial_frequency": ("spatial_frequency", "spatial_freq", "sf"),
    "temporal_frequency": ("temporal_frequency", "temporal_freq", "tf"),
    "phase": ("phase", "spatial_phase"),
    "contrast": ("contrast",),
    "contrast_left": ("contrast_left",),
    "contrast_right": ("contrast_right",),
    "x": ("x_position", "x", "azimuth", "pos_x"),
    "y": ("y_position", "y", "elevation", "altitude", "pos_y"),
    "position": ("position", "pos"),
    "size": ("size", "diameter"),
    "width": ("width",),
    "height": ("height",),
    "color": ("color", "colour", "luminance"),
    "opacity": ("opacity",),
    "frame": ("frame", "frame_index", "frame_number", "image_index"),
    "tone": ("tone_frequency", "tone", "sound_frequency", "auditory_frequency"),
    "level": ("sound_level", "tone_level", "sound_intensity", "level"),
    "units": ("units",),
    "side": ("side",),
    "stimulus": ("stimulus_name", "stimulus_type", "visual_stimulus"),
    "picture": (
        *("image_name", "image", "picture_name", "movie_name", "clip_name"),
        *("condition_hash", "movie_hash", "clip_hash", "stimulus_hash", "stim_hash", "hash"),
    ),
    "picture_set": ("image_set", "stimulus_template_name", "template_name"),
    "on": ("stim_on_time", "stim_on_times", "stimulus_on_time", "stimulus_onset_time", "stim_onset_time"),
    "off": ("stim_off_time", "stim_off_times", "stimulus_off_time", "stimulus_offset_time", "stim_offset_time"),
}
# What no table has but one of stimuli; the other words (phase, frame, size, ...) mean something else elsewhere, too.
TELLING = ("spatial_frequency", "temporal_frequency", "contrast", "contrast_left", "contrast_right", "tone")
TELLING_TEXT = ("stimulus", "picture")

PREFIXES = ("visual_stimulus_", "gabor_stimulus_", "stimulus_", "stim_", "grating_", "gratings_", "gabor_")
# Units that a column's name may end in, as what a value is multiplied with to be in the unit of the vocabulary.
UNIT_FACTORS = {
    "deg": 1.0,
    "degree": 1.0,
    "degrees": 1.0,
    "rad": 180 / np.pi,
    "radians": 180 / np.pi,
    "cycles": 1.0,
    "hz": 1.0,
    "khz": 1000.0,
    "cpd": 1.0,
    "db": 1.0,
    "percent": 0.01,
}
IN_TURNS = {"deg": 1 / 360, "degree": 1 / 360, "degrees": 1 / 360, "rad": 0.5 / np.pi, "radians": 0.5 / np.pi}

# Words for one type of stimulus.
SAME_TYPE = {
    "gabors": "gabor",
    "gabor_patch": "gabor",
    "gabor_patches": "gabor",
    "drifting_grating": "drifting_gratings",
    "moving_grating": "drifting_gratings",
    "moving_gratings": "drifting_gratings",
    "static_grating": "static_gratings",
    "stationary_gratings": "static_gratings",
    "flash": "flashes",
    "full_field_flash": "flashes",
    "full_field_flashes": "flashes",
    "natural_scene": "natural_scenes",
    "natural_image": "natural_scenes",
    "natural_images": "natural_scenes",
    "tones": "tone",
    "pure_tone": "tone",
    "pure_tones": "tone",
    "spontaneous_activity": "spontaneous",
    "gray_screen": "spontaneous",
    "grey_screen": "spontaneous",
}
ANY_TABLE = {"trials", "epochs", "intervals", "stimulus", "stimuli", "stimulus_table", "presentations", "unnamed"}


@dataclass(frozen=True, kw_only=True)
class Words:
    """What a table says, row by row."""

    values: Floats  # (N, P) of settings.STIMULUS_FIELDS; duration_s is left NaN
    types: list[str]  # N
    names: list[tuple[str, ...]]  # N; names under which pixels may be found, the most special first; () of a blank
    on: str | None = None  # column of the onset, where it is not start_time
    off: str | None = None
    used: frozenset[str] = frozenset()  # columns that were understood
    remarks: tuple[str, ...] = ()  # what was concluded from the values: for the audit


@dataclass(kw_only=True)
class _Table:
    """Columns of a table by the vocabulary's words."""

    num_rows: int
    columns: Mapping[str, Column]
    found: dict[str, list[str]] = field(default_factory=dict)  # word: columns, in order of preference
    units: dict[str, str] = field(default_factory=dict)  # column: unit in its name, "" = none
    remarks: list[str] = field(default_factory=list)


def is_telling(columns: Mapping[str, Column], num_rows: int) -> bool:
    """Whether a table's own columns say that it is one of stimuli: one that no other table has, with a value in it."""
    table = _matched(columns, num_rows)
    numbers = any(np.isfinite(_first(table, word)).any() for word in TELLING)
    angles = bool((np.abs(_first(table, "orientation")) > 2).any())  # a direction of 1 or -1 is a side, no angle
    return numbers or angles or any(any(not is_nothing(text) for text in _texts(table, word)) for word in TELLING_TEXT)


def words_of(columns: Mapping[str, Column], num_rows: int, table_name: str) -> Words:
    """Translate a table's columns; rows are those of the file."""
    table = _matched(columns, num_rows)
    values = _values(table)
    pictures = _texts(table, "picture")
    types = _types(table, values, table_name)
    blank = _blanks(table, types, values, pictures)
    sets, own = _texts(table, "picture_set"), snake_case(table_name).removesuffix("_presentations")
    stimuli = _texts(table, "stimulus")
    own = "" if own in ANY_TABLE else own
    names = [
        () if is_blank else tuple(name for name in (picture, group, kind or own) if not is_nothing(name))
        for is_blank, picture, group, kind in zip(blank, pictures, sets, stimuli, strict=True)
    ]
    full = [
        BLANK if is_blank else kind if is_nothing(picture) else f"{kind}/{snake_case(picture)}"
        for is_blank, kind, picture in zip(blank, types, pictures, strict=True)
    ]
    on, off = (table.found.get(word, [None])[0] for word in ("on", "off"))
    used = frozenset(column for found in table.found.values() for column in found)
    return Words(values=values, types=full, names=names, on=on, off=off, used=used, remarks=tuple(table.remarks))


def is_nothing(text: str) -> bool:
    """Whether a name says that nothing was shown."""
    return text.strip().lower() in NOTHING


# ---------------------------------------------------------------- columns


def _matched(columns: Mapping[str, Column], num_rows: int) -> _Table:
    table = _Table(num_rows=num_rows, columns=columns)
    spelled: dict[str, tuple[str, str]] = {}
    for column in columns:
        for name, unit in _spellings(column):
            spelled.setdefault(name, (column, unit))
    for word, names in QUANTITIES.items():
        found = dict(spelled[name] for name in reversed(names) if name in spelled)
        if found:
            table.found[word] = list(reversed(found))
            table.units.update(found)
    return table


def _spellings(column: str) -> list[tuple[str, str]]:
    """A column's name as it is, without its unit, without its prefix, without both; each with the unit taken off."""
    name = snake_case(column)
    stem, _, unit = name.rpartition("_")
    known = [(name, ""), (stem, unit)] if stem and unit in UNIT_FACTORS else [(name, "")]
    return known + [
        (spelling.removeprefix(prefix), unit)
        for spelling, unit in known
        for prefix in PREFIXES
        if spelling.startswith(prefix)
    ]


@cache
def parse(text: str) -> tuple[float, ...]:
    """Numbers of a text, whatever brackets are around them: '0.25', '[250.0, 250.0]', 'None'; () if there is none."""
    if is_nothing(text) and text.strip() != "-1":
        return ()
    try:
        return (float(text),)
    except ValueError:
        pass  # no plain number: perhaps a list
    try:
        return _flat(ast.literal_eval(re.sub(r"\s+", " ", text).strip()))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # words: no number is in them
        return ()


def _flat(value: Any) -> tuple[float, ...]:
    if isinstance(value, list | tuple):
        return tuple(number for item in value for number in _flat(item))
    return (float(value),) if isinstance(value, int | float) else ()


def _parsed(column: Column) -> list[tuple[float, ...]]:
    if isinstance(column, list):
        return [parse(text) for text in column]
    return [tuple(row) for row in column.reshape(len(column), -1).astype(np.float64).tolist()]


def _reduced(table: _Table, word: str, take: Callable[[tuple[float, ...]], float]) -> Floats:
    """One number per row (N,), NaN where no column of this word gives one; of several columns the first that does."""
    result = np.full(table.num_rows, np.nan)
    for column in table.found.get(word, []):
        rows = [take(row) if row else np.nan for row in _parsed(table.columns[column])]
        unit = table.units.get(column, "")
        factor = IN_TURNS.get(unit, 1.0) if word == "phase" else UNIT_FACTORS.get(unit, 1.0)
        result = np.where(np.isfinite(result), result, np.array(rows) * factor)
    result[~np.isfinite(result)] = np.nan
    return result


def _first(table: _Table, word: str) -> Floats:
    return _reduced(table, word, lambda row: row[0])


def _second(table: _Table, word: str) -> Floats:
    return _reduced(table, word, lambda row: row[1] if len(row) > 1 else np.nan)


def _texts(table: _Table, word: str) -> list[str]:
    """One text per row, "" where no column of this word gives one."""
    result = [""] * table.num_rows
    for column in table.found.get(word, []):
        values = table.columns[column]
        if isinstance(values, list):
            result = [old if not is_nothing(old) else new.strip() for old, new in zip(result, values, strict=True)]
    return result


# ---------------------------------------------------------------- quantities


def _values(table: _Table) -> Floats:
    contrast, side_deg = _contrast(table)
    size = _first(table, "size")
    second = _second(table, "size")
    given = {
        "orientation_deg": _first(table, "orientation"),
        "spatial_frequency_cpd": _first(table, "spatial_frequency"),
        "temporal_frequency_hz": _first(table, "temporal_frequency"),
        "phase_cycles": _phase(table),
        "contrast": contrast,
        "x_deg": _or(_or(_first(table, "x"), _first(table, "position")), side_deg),
        "y_deg": _or(_first(table, "y"), _second(table, "position")),
        "width_deg": _or(_first(table, "width"), size),
        "height_deg": _or(_first(table, "height"), _or(second, size)),
        "luminance": _reduced(table, "color", lambda row: float(np.mean(row[:3]))),
        "opacity": _first(table, "opacity"),
        "frame": _frame(table),
        "tone_hz": _first(table, "tone"),
        "level": _first(table, "level"),
    }
    in_pixels = np.array([text.lower().startswith("pix") for text in _texts(table, "units")], bool)
    for name in ("x_deg", "y_deg", "width_deg", "height_deg"):
        given[name][in_pixels] = np.nan
    missing = np.full(table.num_rows, np.nan)
    return np.stack([given.get(name, missing) for name in STIMULUS_FIELDS], axis=1)


def _or(first: Floats, second: Floats) -> Floats:
    return np.where(np.isfinite(first), first, second)


def _frame(table: _Table) -> Floats:
    frame = _first(table, "frame")
    return np.where(frame >= 0, frame, np.nan)


def _phase(table: _Table) -> Floats:
    """Phase modulo one cycle; whole numbers of at least 30 and up to 360 can only be degrees."""
    phase = _first(table, "phase")
    known = phase[np.isfinite(phase)]
    is_deg = len(known) and (known == np.rint(known)).all() and known.min() >= 0 and 30 <= known.max() <= 360
    if is_deg:
        table.remarks.append(f"phases are whole numbers up to {known.max():g}: they are read as degrees")
        phase = phase / 360
    return phase % 1.0


def _contrast(table: _Table) -> tuple[Floats, Floats]:
    """Contrast from 0 to 1 (N,), and where tables of a left and a right screen put it, in degrees (N,)."""
    contrast = _first(table, "contrast")
    is_stimulus = any("stim" in column.lower() for column in table.found.get("side", []))  # not a reward's side
    sides = _texts(table, "side") if is_stimulus else [""] * table.num_rows
    side_deg = np.array([SIDE_DEG.get(text.lower(), np.nan) for text in sides])
    both = (_first(table, "contrast_left") > 0) & (_first(table, "contrast_right") > 0)
    if both.any():
        table.remarks.append(
            f"{both.sum()} rows show a stimulus on both sides: contrast and place of the left are kept"
        )
    for side in ("left", "right"):
        own = _first(table, f"contrast_{side}")
        is_here = np.isfinite(own) & ~(contrast > 0) & ((own > 0) | ~np.isfinite(contrast))
        contrast, side_deg = np.where(is_here, own, contrast), np.where(is_here, SIDE_DEG[side], side_deg)
    highest = np.nanmax(contrast, initial=0.0)
    if 1 < highest <= 100:
        table.remarks.append(f"contrasts reach {highest:g}: they are read as percent")
        contrast = contrast / 100
    return contrast, side_deg


# ---------------------------------------------------------------- types


def _types(table: _Table, values: Floats, table_name: str) -> list[str]:
    """Type (N,) of each row, without the picture: the table's own word, else what its name or its columns imply."""
    own = snake_case(table_name).removesuffix("_presentations")
    if own in ANY_TABLE or own.endswith("_trials"):
        own = _implied(values) or own
    names = _texts(table, "stimulus")
    kinds = [own if is_nothing(name) else snake_case(name).removesuffix("_presentations") for name in names]
    return [SAME_TYPE.get(kind, kind) for kind in kinds]


def _implied(values: Floats) -> str:
    """A type for a table whose name says nothing, by the quantities that it gives."""
    given = {name for name, column in zip(STIMULUS_FIELDS, values.T, strict=True) if np.isfinite(column).any()}
    if "tone_hz" in given:
        return "tone"
    if "orientation_deg" in given or "spatial_frequency_cpd" in given:
        return "drifting_gratings" if "temporal_frequency_hz" in given else "static_gratings"
    return "gabor" if {"contrast", "x_deg"} <= given else ""


def _blanks(table: _Table, types: Sequence[str], values: Floats, pictures: Sequence[str]) -> list[bool]:
    """Rows (N,) that give nothing of what tells the stimuli of their type apart: orientation, picture, frame."""
    columns = [
        np.isfinite(values[:, STIMULUS_FIELDS.index("orientation_deg")]),
        np.isfinite(values[:, STIMULUS_FIELDS.index("frame")]),
        np.array([not is_nothing(picture) for picture in pictures], bool),
    ]
    kinds = np.array(types, object)
    blank = np.array([is_nothing(name) and name != "" for name in _texts(table, "stimulus")], bool)
    for kind in set(types):
        rows = kinds == kind
        given = [column for column in columns if column[rows].any()]
        if given:
            blank |= rows & ~np.any(given, axis=0)
    result: list[bool] = blank.tolist()
    return result
