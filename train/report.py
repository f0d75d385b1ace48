"""`python -m train report`: what a run was, how it went and what it has learned, as one HTML file.

In: a run folder, of a run that is over, goes on, or has only begun. Out: one file of HTML that needs nothing else: no
network, no folder beside it.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from train import picture, report_plots
from train.checkpoint import CheckpointError
from train.metrics import Row, task_name
from train.modalities import PREDICTED
from train.plots import RC, data_uri
from train.run_folder import RunFolder, counted, duration, incident_details, phase_shares, short, size
from train.trained import load_trained

TEMPLATE = Path(__file__).with_name("report.html")
RECENT = 100  # steps that a number "now" is the mean of
MOST = 12  # rows of a table of sessions or regions; of more, the best and the worst
MAX_INCIDENTS = 200


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m train report`."""
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--out", type=Path, help="the file to write (RUN_DIR/report.html)")
    parser.add_argument(
        "--windows",
        type=int,
        default=8,
        help="windows that are predicted for the pictures (%(default)s); 0: no picture",
    )


def main(args: argparse.Namespace) -> int:
    """Write the report."""
    out = args.out or args.run_dir / "report.html"
    page = render(RunFolder(args.run_dir), args.windows, time.time())
    out.write_text(page, encoding="utf-8")
    print(f"{out}: {size(len(page.encode()))}; open it in any browser.")
    return 0


def render(folder: RunFolder, num_windows: int, now_unix_s: float) -> str:
    """The page."""
    steps, validations = list(folder.steps), list(folder.validations)
    predicted, missing = _predicted(folder, num_windows)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "duration": duration,
        "size": size,
        "counted": counted,
        "when": _when,
        "short": short,
        "details": incident_details,
    }
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=folder.name,
        state=state(folder, now_unix_s),
        written=_when(now_unix_s),
        run=folder.run,
        config=(folder.path / "config.yaml").read_text(),
        environment=folder.environment(),
        store=folder.store(),
        num_done=folder.num_done,
        num_recent=min(RECENT, len(steps)),
        total=totals(steps) if steps else None,
        families=by_family(steps[-RECENT:]),
        modalities=PREDICTED,
        validation=validation_tables(validations) if validations else None,
        checkpoints=folder.checkpoints(),
        incidents=folder.incidents[-MAX_INCIDENTS:],
        num_incidents=len(folder.incidents),
        plots=_plots(steps, validations),
        predicted=predicted,
        missing=missing,
    )


def state(folder: RunFolder, now_unix_s: float) -> str:
    """Where the run stands, in words."""
    done, planned = folder.num_done, folder.run.train.num_steps
    if done >= planned:
        return f"All {planned:,} steps are done."
    if not done:
        return "No step has been done yet."
    silent = duration(now_unix_s - folder.steps[-1]["unix_s"])
    return f"{done:,} of {planned:,} steps are done; the last one {silent} before this page was written."


def totals(steps: list[Row]) -> dict[str, Any]:
    """Numbers of the whole run, and of its last steps."""
    recent = steps[-RECENT:]
    return {
        "seconds": sum(row["seconds"] for row in steps),
        "unit_hours": steps[-1]["unit_hours"],
        "tokens": sum(row["tokens_per_s"] * row["seconds"] for row in steps),
        "tokens_per_s": float(np.mean([row["tokens_per_s"] for row in recent])),
        "step_s": float(np.median([row["seconds"] for row in recent])),
        "flops_per_s": sum(row["flops"] for row in recent) / sum(row["seconds"] for row in recent),
        "mfu": float(np.mean([row["mfu"] for row in recent])) if "mfu" in recent[-1] else None,
        "memory": steps[-1]["peak_memory_bytes"],
        "shares": [(name, share, report_plots.OF_PHASE[name]) for name, share in phase_shares(recent).items()],
    }


def by_family(recent: list[Row]) -> list[dict[str, Any]]:
    """Mean loss and nats of each family over the last steps."""
    rows = []
    for family in dict.fromkeys(row["family"] for row in recent):
        own = [row for row in recent if row["family"] == family]
        nats = {
            name: float(np.mean(values))
            for name in PREDICTED
            if (values := [row[f"nats_{name}"] for row in own if f"nats_{name}" in row])
        }
        loss = float(np.mean([row["loss"] for row in own]))
        rows.append({"family": family, "num": len(own), "loss": loss, "nats": nats})
    return rows


def validation_tables(validations: list[Row]) -> dict[str, Any]:
    """The last validation: tasks with their best so far; sessions and regions by task, the best and the worst."""
    last = validations[-1]
    best: dict[str, float] = {}
    for row in validations:
        for score in row["scores"]:
            if score["of"] == "all" and score["deviance_explained"] is not None:
                name = task_name(score)
                best[name] = max(best.get(name, -np.inf), score["deviance_explained"])
    tasks = [{**score, "title": task_name(score)} for score in last["scores"] if score["of"] == "all"]
    tables = [_by_name(last["scores"], of, [task["title"] for task in tasks]) for of in ("region", "session")]
    return {"step": last["step"], "num_windows": last["num_windows"], "tasks": tasks, "best": best, "tables": tables}


def _by_name(scores: list[Row], of: str, tasks: list[str]) -> dict[str, Any]:
    """Rows of scores by task, from the best mean to the worst; those between are left out where there are many."""
    found: dict[str, dict[str, float]] = {}
    for score in scores:
        if score["of"] == of and score["deviance_explained"] is not None:
            found.setdefault(score["name"], {})[task_name(score)] = score["deviance_explained"]
    mean = {name: float(np.mean([*own.values()])) for name, own in found.items()}
    ranked = sorted(found, key=lambda name: -mean[name])
    shown = ranked if len(ranked) <= MOST else [*ranked[: MOST // 2], *ranked[-(MOST // 2) :]]
    rows = [{"name": name, "mean": mean[name], "scores": found[name]} for name in shown]
    known = [task for task in tasks if any(task in found[name] for name in shown)]
    return {"of": of, "tasks": known, "rows": rows, "num_rows": len(ranked)}


def _plots(steps: list[Row], validations: list[Row]) -> dict[str, str]:
    drawn: dict[str, Callable[[], Figure]] = {}
    if steps:
        drawn |= {
            "nats": lambda: report_plots.nats(steps),
            "losses": lambda: report_plots.losses(steps),
            "time_and_speed": lambda: report_plots.time_and_speed(steps),
        }
    if validations:
        drawn["validation"] = lambda: report_plots.validation(validations)
    with mpl.rc_context(RC):
        return {name: data_uri(draw()) for name, draw in drawn.items()}


def _predicted(folder: RunFolder, num_windows: int) -> tuple[str | None, str]:
    """A picture of the newest checkpoint's predictions, or why there is none."""
    if not num_windows:
        return None, "Pictures were not asked for."
    if not any(saved.is_sealed for saved in folder.checkpoints()):
        return None, "There is no checkpoint yet, and so no model that could predict."
    try:
        trained = load_trained(folder.path)
        with mpl.rc_context(RC):
            figure = picture.figure(trained, "valid", num_windows)
            return (data_uri(figure), "") if figure else (None, "The valid split has nothing that could be pictured.")
    except (CheckpointError, OSError) as error:  # pruned while it was read, or the store is not at hand
        return None, f"The newest checkpoint could not be asked: {error}"


def _when(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))
