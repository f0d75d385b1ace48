"""`python -m train watch`: a run as it goes on, in a terminal.

In: a run folder, on this machine or on a file system that it sees. Out: a page that renews itself, or one page where
the output is no terminal.
"""

import argparse
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from train.metrics import Row
from train.modalities import PREDICTED
from train.run_folder import PHASES, RunFolder, counted, duration, incident_details, phase_shares, size, task_curves

RECENT = 50  # steps that a mean is taken of
WIDTH = 32  # of a curve, in letters
BLOCKS = "▁▂▃▄▅▆▇█"
COLORS = dict(zip(PHASES, ("magenta", "blue", "cyan", "yellow", "green", "bright_black"), strict=True))


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m train watch`."""
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks (%(default)s)")
    parser.add_argument("--once", action="store_true", help="look once, and stop")


def main(args: argparse.Namespace) -> int:
    """Show the run until it has done all its steps, or Ctrl-C."""
    folder, console = RunFolder(args.run_dir), Console()
    if args.once or not console.is_terminal:
        console.print(page(folder, time.time()))
        return 0
    with Live(page(folder, time.time()), console=console, auto_refresh=False) as live:
        try:
            while not _is_over(folder):
                time.sleep(args.every)
                live.update(page(folder, time.time()), refresh=True)
        except KeyboardInterrupt:  # the way to leave
            pass
    return 0


def _is_over(folder: RunFolder) -> bool:
    return any(saved.is_sealed and saved.step >= folder.run.train.num_steps for saved in folder.checkpoints())


def page(folder: RunFolder, now_unix_s: float) -> RenderableType:
    """All there is to see."""
    steps = folder.steps
    parts: list[RenderableType] = [_progress(folder, now_unix_s)]
    if steps:
        parts += [_losses(steps), _time(steps[-RECENT:]), _speed(steps[-RECENT:])]
    if folder.validations:
        parts.append(_validation(folder.validations))
    parts.append(Text("\n".join(_notes(folder, now_unix_s)), style="bright_black"))
    environment = folder.environment()
    ranks = f" · {counted(environment['world_size'], 'rank')}" if environment else ""
    title = f"[bold]{escape(folder.name)}[/] · {folder.run.model.preset}{ranks}"
    return Panel(Group(*_spaced(parts)), title=title, title_align="left", padding=(1, 2))


def _spaced(parts: Sequence[RenderableType]) -> Iterator[RenderableType]:
    for number, part in enumerate(parts):
        if number:
            yield ""
        yield part


def _progress(folder: RunFolder, now_unix_s: float) -> RenderableType:
    done, total, steps = folder.num_done, folder.run.train.num_steps, folder.steps
    said = "waiting for the first step"
    if done >= total:
        said = f"all steps are done, {duration(now_unix_s - steps[-1]['unix_s'])} ago"
    elif steps:
        left_s = float(np.median([row["seconds"] for row in steps[-RECENT:]])) * (total - done)
        said = f"{duration(left_s)} left · last step {duration(now_unix_s - steps[-1]['unix_s'])} ago"
    grid = Table.grid(padding=(0, 2))
    grid.add_row(
        f"step [bold]{done:,}[/] / {total:,}", ProgressBar(total, done, width=WIDTH), f"{done / total:.0%}", said
    )
    return grid


def _losses(steps: list[Row]) -> Table:
    """Of each modality and of the whole: now, and the curve so far."""
    table = Table.grid(padding=(0, 2))
    for name in ("loss", *(f"nats_{modality}" for modality in PREDICTED)):
        values = [row[name] for row in steps if name in row]
        label = f"{name[5:]} (nats)" if name.startswith("nats_") else name
        if values:
            table.add_row(label, f"[bold]{np.mean(values[-RECENT:]):+.4f}[/]", Text(curve(values), style="blue"))
    return table


def _time(recent: list[Row]) -> RenderableType:
    """One bar: what the last steps were spent on."""
    shares = phase_shares(recent)
    bar = Text()
    for name, share in shares.items():
        bar.append("█" * round(share * 2 * WIDTH), style=COLORS[name])
    words = Text("  ").join(
        Text.assemble((f"{name.replace('_', ' ')} ", COLORS[name]), f"{share:.1%}") for name, share in shares.items()
    )
    return Group(bar, words)


def _speed(recent: list[Row]) -> Text:
    last = recent[-1]
    said = [
        f"{np.mean([row['tokens_per_s'] for row in recent]):,.0f} tokens/s",
        f"{last['unit_hours']:,.1f} unit-hours seen",
        f"{last['peak_memory_bytes'] / 2**30:.2f} GiB",
        f"learning rate {last['lr']:.2g}",
    ]
    if "gradient_norm" in last:
        said.append(f"gradient norm {last['gradient_norm']:.3g}")
    if "mfu" in last:
        said.insert(1, f"MFU {np.mean([row['mfu'] for row in recent]):.1%}")
    return Text(" · ".join(said))


def _validation(validations: list[Row]) -> Table:
    """Deviance explained of the valid split by task: at the last validation, the best, the curve."""
    table = Table(title=f"deviance explained of the valid split, after {validations[-1]['step']:,} steps", box=None)
    table.title_justify = "left"
    for name, justify in (("task", "left"), ("now", "right"), ("best", "right"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]  # rich's own words
    for name, values in task_curves(validations).items():
        known = [value for value in values if value is not None]
        if known:
            table.add_row(name, f"[bold]{known[-1]:.3f}[/]", f"{max(known):.3f}", Text(curve(known), style="blue"))
    return table


def _ranks(beats: list[Row], now_unix_s: float) -> str:
    """What the ranks are doing, and who is behind: all of them pass the same phases."""
    doing = Counter(beat["phase"] for beat in beats)
    told = ", ".join(f"{count} in {phase}" for phase, count in doing.most_common())
    last = min(beats, key=lambda beat: beat["num_phases"])
    behind = max(beat["num_phases"] for beat in beats) - last["num_phases"]
    late = f"; rank {last['rank']} on {last['host']} is {counted(behind, 'phase')} behind" if behind else ""
    return f"ranks: {told}{late}; heard {duration(now_unix_s - min(beat['unix_s'] for beat in beats))} ago"


def _notes(folder: RunFolder, now_unix_s: float) -> Iterator[str]:
    saved = [one for one in folder.checkpoints() if one.is_sealed]
    if saved:
        last = saved[-1]
        yield f"checkpoint: step {last.step:,}, {size(last.num_bytes)}, {duration(now_unix_s - last.unix_s)} ago"
    else:
        yield "no checkpoint yet"
    if beats := folder.beats():
        yield _ranks(beats, now_unix_s)
    for incident in folder.incidents[-3:]:
        yield f"step {incident['step']}, {incident['what']}: {incident_details(incident)}"


def curve(values: Sequence[float]) -> str:
    """A line of blocks, WIDTH at most: medians of equal parts, from low to high; outliers stop at the edge."""
    parts = [float(np.median(part)) for part in np.array_split(np.asarray(values, float), min(WIDTH, len(values)))]
    finite = [part for part in parts if np.isfinite(part)]
    if not finite:
        return ""
    low, high = np.quantile(finite, (0.03, 0.97))
    heights = [min(1.0, max(0.0, (part - low) / ((high - low) or 1.0))) for part in finite]
    return "".join(BLOCKS[int(height * 7.99)] for height in heights)
