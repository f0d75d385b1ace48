"""`python -m prep inspect`: what is in an NWB file, what would become of each object, and which recipe it asks for.

In: the path of a file or a folder, and a recipe. Out: coverage table, clock audit, streams and splits, or one line for
each file of a folder; a suggested recipe.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import prep.recipe
from prep.files import InputFile, find_files, is_nwb_folder
from prep.nwb.inventory import COLUMN_TYPES
from prep.nwb.join import plan_sessions
from prep.nwb.session import UnusableFile
from prep.plan import Finding, Found, PlannedStream, PrepError, SessionPlan
from prep.recipe import Recipe
from prep.settings import ConfigError
from prep.suggest import Inspected, suggest
from prep.text_table import table_lines, terminal_width

NUMBERS = ("tokens", "sources", "samples/token", "rate_hz", "start_s", "stop_s", "rows")


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments of `inspect`."""
    parser.add_argument("file", type=Path, help="an NWB file, or a folder: then one line for each session")
    parser.add_argument("--recipe", type=Path, metavar="R.yaml", help="what to make of ambiguous files")
    parser.add_argument("--dataset", metavar="NAME", help="dataset_id; else the recipe's, else the folder's name")
    parser.add_argument("--suggest", type=Path, metavar="R.yaml", help="write the suggested recipe to this file")


def main(args: argparse.Namespace) -> int:
    """Print what would become of a file, or of those of a folder; 1 where one would be refused, or a part of it."""
    recipe = prep.recipe.load(args.recipe)
    if args.suggest is not None and args.suggest.exists():
        raise ConfigError(f"{args.suggest} exists already. Give --suggest a new name, or move the file away.")
    is_folder = args.file.is_dir() and not is_nwb_folder(args.file.name)
    if is_folder:
        files = find_files([args.file], args.dataset or recipe.dataset_id, join=recipe.join)
    else:
        dataset_id = args.dataset or recipe.dataset_id or args.file.resolve().parent.name or "dataset"
        files = [InputFile((args.file.absolute(),), str(args.file), dataset_id)]
    inspected, rows, is_failure = [], [], False
    for file in files:
        plan = _plan(file, recipe)
        inspected.append(_inspected(file, plan))
        rows.append((file.label, *_summary(plan)))
        is_failure |= isinstance(plan, PrepError) or bool(plan.refused)
        if not is_folder:
            print(f"{file.label}\n{render(plan)}")
    if is_folder:
        header = ("file", "units", "streams", "objects", "used", "what")
        print("\n".join(table_lines(header, rows, right=header[1:5], width=terminal_width())))
    text = suggest(inspected, recipe)
    print(f"\nsuggested recipe:\n{text}" if text else "\nno recipe is needed: nothing is left open.")
    if args.suggest is not None:
        args.suggest.write_text(text, encoding="utf-8")
    return 1 if is_failure else 0


def _plan(file: InputFile, recipe: Recipe) -> SessionPlan | PrepError:
    try:
        return plan_sessions(file.paths, recipe, file.dataset_id)
    except PrepError as error:
        return error


def _inspected(file: InputFile, plan: SessionPlan | PrepError) -> Inspected:
    """What the suggested recipe is made from."""
    if isinstance(plan, SessionPlan):
        streams, intervals = plan.streams, plan.intervals
        return Inspected(
            paths=file.paths, coverage=plan.coverage, findings=plan.findings, streams=streams, intervals=intervals
        )
    coverage, findings = (plan.coverage, plan.findings) if isinstance(plan, UnusableFile) else ((), ())
    return Inspected(paths=file.paths, coverage=coverage, findings=findings, intervals={})


def _summary(plan: SessionPlan | PrepError) -> tuple[str, ...]:
    """Numbers of units, streams, objects and used objects of a file, and one line of what becomes of it."""
    coverage = () if isinstance(plan, PrepError) and not isinstance(plan, UnusableFile) else plan.coverage
    num_used = sum(row.used_as is not None for row in coverage)
    objects = (f"{len(coverage):,}", f"{num_used:,}") if coverage else ("-", "-")
    if isinstance(plan, PrepError):
        return "-", "-", *objects, f"refused: {plan}"
    numbers = (f"{len(plan.units.unit_key):,}", str(len(plan.streams)))
    names = ", ".join(stream.spec.name for stream in plan.streams)
    return *numbers, *objects, "; ".join([names, *(f"without {row.path}: {row.message}" for row in plan.refused)])


def render(plan: SessionPlan | PrepError) -> str:
    """The whole report on one file."""
    if isinstance(plan, PrepError):
        parts = [f"refused: {plan}"]
        if isinstance(plan, UnusableFile):
            parts += [_coverage(plan.coverage), _findings(plan.findings)]
        return "\n\n".join(part for part in parts if part)
    identity = [
        ("dataset", plan.dataset_id),
        ("session", plan.session_id),
        ("subject", plan.subject_id or "not given"),
        ("licence", plan.licence or "not given"),
        ("units", f"{len(plan.units.unit_key):,}"),
    ]
    parts = [
        "\n".join(f"{name:8} {value}" for name, value in identity),
        _coverage(plan.coverage),
        _findings(plan.findings),
        _streams(plan.streams),
        _intervals(plan),
        _splits(plan.splits),
    ]
    return "\n\n".join(part for part in parts if part)


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A titled table; "" without rows."""
    header_line, *lines = table_lines(header, rows, right=NUMBERS)
    return "\n".join([f"{title}:", *(f"  {line}" for line in (header_line, *lines))]) if lines else ""


def _coverage(coverage: Sequence[Found]) -> str:
    """One row per object; the columns of tables are counted, by what became of them."""
    rows = []
    for row in coverage:
        if row.neurodata_type not in COLUMN_TYPES:
            rows.append((row.path, row.neurodata_type, row.used_as or "skipped", row.reason))
    columns = Counter(
        (row.path.rsplit("/", 1)[0], row.used_as or "skipped", row.reason)
        for row in coverage
        if row.neurodata_type in COLUMN_TYPES
    )
    for (path, used_as, reason), count in columns.items():
        rows.append((f"{path}/*", f"{count} columns" if count > 1 else "1 column", used_as, reason))
    num_used = sum(row.used_as is not None for row in coverage)
    title = f"coverage ({len(coverage)} objects, {num_used} used, {len(coverage) - num_used} skipped)"
    return _table(title, ("object", "type", "becomes", "reason"), sorted(rows))


def _findings(findings: Sequence[Finding]) -> str:
    rows = [(found.code, found.action, found.path, found.message) for found in findings]
    return _table("clock audit", ("finding", "action", "object", "what"), rows)


def _streams(streams: Sequence[PlannedStream]) -> str:
    sizes = ("tokens", "sources", "samples/token", "rate_hz", "start_s", "stop_s")
    header = ("stream", "kind", "modality", *sizes, "from")
    rows = []
    for stream in streams:
        spec = stream.spec
        start_s, stop_s = stream.start_ns[0] / 1e9, (stream.start_ns[-1] + spec.duration_ns) / 1e9
        rate = f"{1e9 / spec.sample_ns:.4g}" if spec.sample_ns and spec.kind != "event" else ""
        numbers = (f"{spec.num_tokens:,}", f"{spec.num_sources:,}", str(spec.samples_per_token), rate)
        rows.append((spec.name, spec.kind, spec.modality, *numbers, f"{start_s:.3f}", f"{stop_s:.3f}", spec.origin))
    return _table("streams", header, rows)


def _intervals(plan: SessionPlan) -> str:
    rows = [(name, f"{len(table.start_ns):,}", ", ".join(table.columns)) for name, table in plan.intervals.items()]
    return _table("intervals", ("table", "rows", "columns"), rows)


def _splits(splits: Sequence[tuple[int, int, str]]) -> str:
    rows = [(label, f"{start / 1e9:.3f}", f"{stop / 1e9:.3f}") for start, stop, label in splits]
    return _table("splits", ("split", "start_s", "stop_s"), rows)
