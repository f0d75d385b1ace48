"""The curves of a run's report: losses, validation, time, throughput.

In: rows of metrics.jsonl and validation.jsonl. Out: figures.
"""

from collections.abc import Sequence
from itertools import cycle

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from train.metrics import Row
from train.modalities import PREDICTED
from train.plots import GRID, OF_MODALITY, PALETTE, WIDTH_IN
from train.run_folder import PHASES, phase_shares, short, task_curves

NUM_POINTS = 160  # of a curve, however many steps there are
OF_PHASE = dict(zip(PHASES, (PALETTE[3], PALETTE[0], PALETTE[5], PALETTE[1], PALETTE[2], PALETTE[7]), strict=True))
Floats = npt.NDArray[np.float64]


def parts(num_rows: int) -> list[npt.NDArray[np.int64]]:
    """Rows [0, num_rows) in order, in NUM_POINTS parts at most, all of one size but the last: the points of a curve."""
    size = max(1, -(-num_rows // NUM_POINTS))
    return [np.arange(first, min(first + size, num_rows)) for first in range(0, num_rows, size)]


def nats(steps: Sequence[Row]) -> Figure:
    """What each value costs more than under the null model, a panel for each modality."""
    shown = [name for name in PREDICTED if any(f"nats_{name}" in row for row in steps)]
    figure, panels = _panels(len(shown))
    for axes, name in zip(panels, shown, strict=True):
        own = [row for row in steps if f"nats_{name}" in row]
        axes.axhline(0, color=GRID, linewidth=1.4)
        _curve(axes, own, f"nats_{name}", name, OF_MODALITY[name])
        _finish(axes, name)
        _without_outliers(axes)
    return figure


def losses(steps: Sequence[Row]) -> Figure:
    """The loss by task family, the gradient's norm before it is clipped, the learning rate."""
    figure, (left, middle, right) = _panels(3, legend_in=0.55)
    for family, color in zip(dict.fromkeys(row["family"] for row in steps), cycle(PALETTE), strict=False):
        _curve(left, [row for row in steps if row["family"] == family], "loss", family, color)
    _finish(left, "loss by task family")
    _legend(left, ncols=2)
    _without_outliers(left)
    _curve(middle, steps, "gradient_norm", "", PALETTE[4])
    middle.set_yscale("log")
    middle.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    middle.minorticks_off()
    _finish(middle, "norm of the gradient")
    _curve(right, steps, "lr", "", PALETTE[6])
    _finish(right, "learning rate")
    return figure


def validation(validations: Sequence[Row]) -> Figure:
    """Deviance explained by task, a panel for each modality."""
    curves = task_curves(list(validations))
    at = [row["step"] for row in validations]
    shown = [name for name in PREDICTED if any(task.startswith(f"{name} ") for task in curves)]
    figure, panels = _panels(len(shown), legend_in=0.75)
    for axes, modality in zip(panels, shown, strict=True):
        own = {task: values for task, values in curves.items() if task.startswith(f"{modality} ")}
        for (task, values), color in zip(own.items(), PALETTE, strict=False):
            known = np.array([np.nan if value is None else value for value in values])
            axes.plot(at, known, ".-", color=color, linewidth=1.6, ms=5, label=task.removeprefix(f"{modality} "))
        axes.axhline(0, color=GRID, linewidth=1.4)
        _finish(axes, modality)
        _legend(axes, ncols=1)
    return figure


def time_and_speed(steps: Sequence[Row]) -> Figure:
    """What the time of a step goes into; tokens a second."""
    figure, (left, right) = _panels(2, legend_in=0.3)
    groups = [[steps[i] for i in part] for part in parts(len(steps))]
    at = [float(np.mean([row["step"] for row in group])) for group in groups]
    shares = [phase_shares(group) for group in groups]
    names = [name for name in PHASES if name in shares[-1]]
    stacked = [[share.get(name, 0.0) for share in shares] for name in names]
    left.stackplot(
        at, stacked, colors=[OF_PHASE[name] for name in names], labels=[n.replace("_", " ") for n in names], linewidth=0
    )
    left.set_ylim(0, 1)
    _curve(right, steps, "tokens_per_s", "tokens/s", PALETTE[0])
    right.set_ylim(bottom=0)
    _finish(left, "share of a step's time")
    left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _legend(left, ncols=len(names))
    _finish(right, "tokens a second")
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    return figure


def _panels(count: int, legend_in: float = 0.0) -> tuple[Figure, list[Axes]]:
    """Axes side by side, with room for a legend below."""
    below_in, plot_in, above_in = 0.45 + legend_in, 1.8, 0.25
    height_in = below_in + plot_in + above_in
    figure = Figure(figsize=(WIDTH_IN, height_in))
    figure.subplots_adjust(
        left=0.055, right=0.985, wspace=0.15, bottom=below_in / height_in, top=1 - above_in / height_in
    )
    return figure, [figure.add_subplot(1, count, 1 + number) for number in range(count)]


def _curve(axes: Axes, rows: Sequence[Row], name: str, label: str, color: str | None) -> None:
    """Median of each part, smoothed, and where eight of ten steps lie; a value that is not finite is left out."""
    known = [row for row in rows if np.isfinite(row.get(name, np.nan))]
    if not known:
        return
    at, values = (np.array([row[key] for row in known], float) for key in ("step", name))
    grouped = parts(len(known))
    low, middle, high = (np.array([np.quantile(values[part], share) for part in grouped]) for share in (0.1, 0.5, 0.9))
    middle_at = np.array([at[part].mean() for part in grouped])
    axes.fill_between(middle_at, low, high, color=color, alpha=0.18, linewidth=0)
    axes.plot(middle_at, _smooth(middle), color=color, linewidth=1.7, label=label)


def _without_outliers(axes: Axes) -> None:
    """Show where nearly all of the curves lie: one bad step must not flatten the others."""
    lines = [np.asarray(line.get_ydata(), float) for line in axes.get_lines()]
    low, high = np.quantile(np.concatenate(lines), (0.02, 0.98)) if lines else (0.0, 0.0)
    if high > low:
        axes.set_ylim(low - 0.15 * (high - low), high + 0.15 * (high - low))


def _smooth(values: Floats) -> Floats:
    """Mean over a moving window of a twentieth of the curve, shorter at its ends."""
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    reach = np.minimum(half, np.minimum(place, len(values) - 1 - place))
    smooth: Floats = (sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1)
    return smooth


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _legend(axes: Axes, ncols: int) -> None:
    """Below the axes, where no curve is."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=ncols, fontsize=8, columnspacing=1.2)
