"""The recipe that files ask for: one line for each thing that they leave open, with the reason.

In: what became of each object of the files (coverage, audit, streams). Out: YAML that prep.recipe.load reads back.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prep.plan import Finding, Found, IntervalTable, PlannedStream
from prep.recipe import Recipe
from prep.store import sanitise

JOIN = r"^(sub-[^_]+_ses-[^_]+)_"  # as DANDI names the files of one session
FEWEST_SIGNALS = 3
NUMBERED = re.compile(r"^(.*?)[_-]?(\d+)$")
NAMES_PIXELS = re.compile(r"(image|movie|picture|clip|scene)_?(name|file|hash)$", re.IGNORECASE)  # a column
IS_FILE = re.compile(r"\.(png|jpe?g|tiff?|bmp|npy|mp4|avi)$", re.IGNORECASE)  # a value
SAME_CELLS = "same cells as "
OTHER_UNITS = "another table of units is read"
REFERENCE = re.compile(r"the intervals of (.+?), [+-]")
LISTS = ("angles", "series", "units")


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """What `inspect` knows about the files of one session."""

    paths: tuple[Path, ...]
    coverage: Sequence[Found]
    findings: Sequence[Finding]
    streams: Sequence[PlannedStream] = ()
    intervals: Mapping[str, IntervalTable]

    def in_file(self, path: str) -> str:
        """An object's path in its file; of joined files it stands behind the file's name."""
        names = (f"{file.name}/" for file in self.paths if len(self.paths) > 1)
        return next((path.removeprefix(name) for name in names if path.startswith(name)), path)


@dataclass(frozen=True, order=True, kw_only=True)
class Line:
    """One entry of the recipe: `key: value`, or an item of the list `key`, and why it is there."""

    key: str
    value: str  # as YAML
    why: str


def suggest(inspected: Iterable[Inspected], recipe: Recipe) -> str:
    """The recipe for these files as YAML with comments, "" where they leave nothing open beyond `recipe`."""
    found: dict[tuple[str, str], Line] = {}
    num_files: Counter[tuple[str, str]] = Counter()
    for one in inspected:
        for line in dict.fromkeys(_lines(one, recipe)):
            key = (line.key, line.value)
            found.setdefault(key, line)
            num_files[key] += 1
    lines = [_with_number(line, num_files[key]) for key, line in found.items()]
    return _yaml(lines) if lines else ""


def _with_number(line: Line, num_files: int) -> Line:
    more = f" (and in {num_files - 1} more)" if num_files > 1 and line.key not in ("licence", "join") else ""
    return Line(key=line.key, value=line.value, why=line.why + more)


def quoted(text: str) -> str:
    """A text as YAML reads it back, whatever it looks like."""
    return json.dumps(text, ensure_ascii=False)


def _lines(one: Inspected, recipe: Recipe) -> Iterator[Line]:
    if not recipe.licence:
        yield Line(key="licence", value='""', why="NWB files do not say; it goes into the model card, e.g. CC-BY-4.0")
    for finding in one.findings:
        path = quoted(one.in_file(finding.path))
        if finding.code == "maybe-angle":
            yield Line(key="angles", value=path, why=finding.message.split(". ")[0] + "; delete the line if it is none")
        reference = REFERENCE.search(finding.message)
        if finding.code == "clock-drift" and reference:
            pair = f"{{reference: {quoted(one.in_file(reference[1]))}, pulses: {path}, streams: []}}"
            why = "one train of pulses, two clocks; list under streams what is on the second clock, and it is mapped"
            yield Line(key="sync", value=pair, why=why)
    yield from _series(one)
    yield from _units(one)
    yield from _lfp(one)
    yield from _signals(one)
    yield from _assets(one)
    if recipe.join is None and _has_siblings(one.paths):
        yield Line(key="join", value=quoted(JOIN), why="several files of one session stand side by side")


def _series(one: Inspected) -> Iterator[Line]:
    others: dict[str, list[str]] = {}
    for row in one.coverage:
        if row.neurodata_type == "RoiResponseSeries" and row.reason.startswith(SAME_CELLS):
            chosen = one.in_file(row.reason.removeprefix(SAME_CELLS))
            others.setdefault(chosen, []).append(one.in_file(row.path))
    for chosen, rest in others.items():
        yield Line(key="series", value=quoted(chosen), why=f"chosen by rule; of the same cells: {', '.join(rest)}")


def _units(one: Inspected) -> Iterator[Line]:
    others = [one.in_file(row.path) for row in one.coverage if row.reason.startswith(OTHER_UNITS)]
    for row in one.coverage:
        if others and row.neurodata_type == "Units" and row.used_as:
            why = f"the table of units that is read; there are others: {', '.join(others)}"
            yield Line(key="units", value=quoted(one.in_file(row.path)), why=why)


def _lfp(one: Inspected) -> Iterator[Line]:
    """Voltages that nothing reads; where some are called LFP, the raw ones are not worth their size."""
    series = [row for row in one.coverage if row.neurodata_type == "ElectricalSeries" and not row.used_as]
    paths = [one.in_file(row.path) for row in series]
    for path in [path for path in paths if "lfp" in path.lower()] or paths:
        why = "voltages; read as band power where they are listed, delete the line to leave them out"
        yield Line(key="lfp.series", value=quoted(path), why=why)


def _signals(one: Inspected) -> Iterator[Line]:
    """TimeSeries of one container that a running number tells apart."""
    of_units = {stream.spec.name for stream in one.streams if stream.spec.first_unit is not None}
    groups: dict[tuple[str, str], int] = {}
    for row in one.coverage:
        container, _, name = one.in_file(row.path).rpartition("/")
        number = NUMBERED.match(name)
        if row.neurodata_type == "TimeSeries" and number and number[1] and row.used_as not in of_units:
            start = name[: number.start(2)]
            groups[container, start] = groups.get((container, start), 0) + 1
    for (container, start), size in groups.items():
        if size >= FEWEST_SIGNALS:
            name = sanitise(re.sub(r"[^a-z0-9]+", "_", start.lower()).strip("_"))
            pattern = quoted(f"{container}/{start}[0-9]*")
            why = f"{size} series that a number tells apart; one stream of as many units, if that is what they are"
            yield Line(key="signals", value=f"{{pattern: {pattern}, name: {quoted(name)}}}", why=why)


def _assets(one: Inspected) -> Iterator[Line]:
    """Stimuli that are named, and whose pixels are in no file."""
    for row in one.coverage:
        outside = re.search(r"its pixels are in another file \((.+?)\)", row.reason)
        if outside:
            entry = f"{{match: {quoted(row.path.rsplit('/', 1)[-1])}, file: {quoted(outside[1].split(', ')[0])}}}"
            yield Line(key="assets", value=entry, why=f"pixels of {one.in_file(row.path)}")
    shown = {row.path.rsplit("/", 1)[-1]: row.used_as or "" for row in one.coverage}
    frames = {stream.spec.name for stream in one.streams if stream.spec.kind == "frames"}
    for name, table in one.intervals.items():
        texts = _pixel_names(table)
        if texts and not frames & set(shown.get(name, "").split(", ")):
            entry = '{match: "*", file: "images/{name}.png"}'
            why = f"{len(texts)} stimuli that the table {name} names ({', '.join(texts[:3])}), without pixels"
            yield Line(key="assets", value=entry, why=why)


def _pixel_names(table: IntervalTable) -> list[str]:
    """The distinct values of the first column that names pictures or films, by its own name or by its values."""
    for column, values in table.columns.items():
        texts = sorted({text for text in values if text}) if isinstance(values, list) else []
        if texts and (NAMES_PIXELS.search(column) or all(IS_FILE.search(text) for text in texts)):
            return texts
    return []


def _has_siblings(paths: Sequence[Path]) -> bool:
    """Whether a file's folder has others of the same session, by DANDI's names."""
    match = re.match(JOIN, paths[0].name)
    if len(paths) > 1 or match is None or not paths[0].parent.is_dir():
        return False
    return sum(path.name.startswith(match[0]) and ".nwb" in path.name for path in paths[0].parent.iterdir()) > 1


# ---------------------------------------------------------------- YAML


def _yaml(lines: Sequence[Line]) -> str:
    """The recipe's text: keys in the order of the default recipe, the reasons as comments."""
    by_key: dict[str, list[Line]] = {}
    for line in lines:
        by_key.setdefault(line.key, []).append(line)
    text = ["# A suggested recipe: only what the files leave open. Read the reasons, keep the lines that are right."]
    for key in ("licence", "join"):
        text += [f"{key}: {line.value}  # {_comment(line.why)}" for line in by_key.get(key, ())]
    for key in (*LISTS, "lfp.series", "signals", "sync"):
        if key in by_key:
            indent = "  " * key.count(".")
            text += [f"{'  ' * depth}{part}:" for depth, part in enumerate(key.split("."))]
            text += [f"{indent}  - {line.value}  # {_comment(line.why)}" for line in by_key[key]]
    if "assets" in by_key:  # files that are not there would be an error: the person says where they are
        text += ["# assets:  # uncomment, and say where the pixels are; paths are from the recipe's folder"]
        text += [f"#   - {line.value}  # {_comment(line.why)}" for line in by_key["assets"]]
    return "\n".join(text) + "\n"


def _comment(text: str) -> str:
    return " ".join(text.split())
