"""`python -m prep report`: what a token store holds, what was repaired, what was left out, as one HTML file.

In: a store. Out: one file of HTML that needs nothing else: no network, no folder beside it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from prep.disk import write_bytes
from prep.report_data import NOT_GIVEN, UNREADABLE, Json, Summary, clip, summarise, unit_columns
from prep.report_pictures import dataset_picture, session_pictures
from prep.settings import SPLITS, ConfigError
from prep.store import Store
from prep.urls import scheme_of
from prep.write_session import software_version

MAX_PICTURED = 24  # sessions with pictures, about 0.3 MB each
MAX_PICTURED_DATASETS = 12
TEMPLATE = Path(__file__).with_name("report.html")


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments of `report`."""
    parser.add_argument("store", help="a token store: a folder, s3://…, https://…")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the file to write (%(default)s)")


def main(args: argparse.Namespace) -> int:
    """Write the report; 0, also where the store holds little or nothing."""
    if not scheme_of(args.store) and args.out.resolve().is_relative_to(Path(args.store).resolve()):
        raise ConfigError(
            f"--out {args.out} lies inside the store {args.store}, where `make verify` takes it for a foreign file. "
            "Give a path outside of it, such as report.html."
        )
    page = render(Store(args.store))
    write_bytes(args.out, page.encode())
    print(f"{args.out}: {len(page.encode()) / 1e6:.1f} MB; open it in any browser.")
    return 0


def render(store: Store) -> str:
    """The page. It holds no time and no path of this machine: the same store gives the same bytes."""
    summary = summarise(store)
    pictures = add_pictures(store, summary)
    content = {
        "totals": summary.totals,
        "datasets": summary.datasets,
        "sessions": summary.sessions,
        "coverage": summary.coverage.rows,
        "findings": summary.findings.rows,
        "coverage_types": [[*key, count] for key, count in sorted(summary.coverage_types.items())],
        "codes": [summary.codes[key] for key in sorted(summary.codes)],
        "vocabulary": [summary.vocabulary[key] for key in sorted(summary.vocabulary)],
        "failures": summary.failures,
        "split_labels": SPLITS,
    }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "separators": (",", ":"), "allow_nan": False}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=store.root.resolve().name,
        digest=store.digest()[:12],
        format=store.catalog["format"],
        version=software_version(),
        totals=summary.totals,
        not_given=NOT_GIVEN,
        num_pictured=sum(bool(row["pictures"]) for row in summary.sessions),
        content=content,
        pictures=pictures,
    )


def add_pictures(store: Store, summary: Summary) -> list[dict[str, str]]:
    """All pictures; sessions and datasets get the numbers of theirs. At most MAX_PICTURED sessions have any."""
    pictures: list[dict[str, str]] = []

    def keep(row: Json, new: Sequence[dict[str, str] | None]) -> None:
        found = [picture for picture in new if picture is not None]
        row["pictures"] = list(range(len(pictures), len(pictures) + len(found)))
        pictures.extend(found)

    for number, row in enumerate(summary.datasets):
        units = summary.units.get(row["dataset"])
        keep(row, [dataset_picture(row["dataset"], units)] if units and number < MAX_PICTURED_DATASETS else [])
    for index in pictured(summary.sessions):
        row = summary.sessions[index]
        try:
            session = store.session(index)
            keep(row, session_pictures(store, session, unit_columns(session)))
        except UNREADABLE as error:
            row["problem"] = row["problem"] or clip(str(error))
    return pictures


def pictured(sessions: Sequence[dict[str, Any]]) -> list[int]:
    """Places of the sessions that get pictures: of each dataset in turn the fullest, until there are MAX_PICTURED."""
    by_dataset: dict[str, list[int]] = {}
    for index, row in enumerate(sessions):
        by_dataset.setdefault(row["dataset"], []).append(index)
    ranked = [sorted(places, key=lambda i: _emptiness(sessions[i])) for places in by_dataset.values()]
    turns = ((turn, number) for number, places in enumerate(ranked) for turn in range(len(places)))
    return [ranked[number][turn] for turn, number in sorted(turns)][:MAX_PICTURED]


def _emptiness(row: dict[str, Any]) -> tuple[int, int, int]:
    return -len(row["modalities"]), -len(row["streams"]), -row["tokens"]
