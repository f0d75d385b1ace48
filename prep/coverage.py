"""`python -m prep inspect`: what is in an NWB file, and what would become of each object.

In: the path of a file, and a recipe. Out: the coverage table, the clock audit, streams and splits, as text.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import prep.recipe
from prep.nwb.inventory import COLUMN_TYPES
from prep.nwb.session import UnusableFile, plan_session
from prep.plan import Finding, Found, PlannedStream, PrepError, SessionPlan
from prep.text_table import table_lines

NUMBERS = ("tokens", "sources", "samples/token", "rate_hz", "start_s", "stop_s", "rows")


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments of `inspect`."""
    parser.add_argument("file", type=Path, help="an NWB file")
    parser.add_argument("--recipe", type=Path, metavar="R.yaml", help="what to make of ambiguous files")
    parser.add_argument("--dataset", metavar="NAME", help="dataset_id; else the recipe's, else the folder's name")


def main(args: argparse.Namespace) -> int:
    """Print what would become of a file; 1 where it would be refused."""
    recipe = prep.recipe.load(args.recipe)
    dataset_id = args.dataset or recipe.dataset_id or args.file.resolve().parent.name or "dataset"
    try:
        plan: SessionPlan | PrepError = plan_session(args.file, recipe, dataset_id)
    except PrepError as error:
        plan = error
    print(f"{args.file}\n{render(plan)}")
    return 1 if isinstance(plan, PrepError) else 0


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
        rate = f"{1e9 / spec.sample_ns:.4g}" if spec.sample_ns else ""
        numbers = (f"{spec.num_tokens:,}", f"{spec.num_sources:,}", str(spec.samples_per_token), rate)
        rows.append((spec.name, spec.kind, spec.modality, *numbers, f"{start_s:.3f}", f"{stop_s:.3f}", spec.origin))
    return _table("streams", header, rows)


def _intervals(plan: SessionPlan) -> str:
    rows = [(name, f"{len(table.start_ns):,}", ", ".join(table.columns)) for name, table in plan.intervals.items()]
    return _table("intervals", ("table", "rows", "columns"), rows)


def _splits(splits: Sequence[tuple[int, int, str]]) -> str:
    rows = [(label, f"{start / 1e9:.3f}", f"{stop / 1e9:.3f}") for start, stop, label in splits]
    return _table("splits", ("split", "start_s", "stop_s"), rows)
