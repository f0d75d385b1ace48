"""What all pictures of the report share, and those of numbers: distributions of units, clocks.

In: columns of units, streams, findings. Out: figures, and SVG as data URIs that follow the light or dark theme.
"""

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prep.report_data import UnitColumns
from prep.store import Stream

# Stand-ins in the drawing that become CSS variables, so that one SVG is right on white and on black.
THEME = {"#010203": "ink", "#010204": "muted", "#010205": "grid", "#010206": "missing"}
INK, MUTED, GRID, MISSING = THEME
STYLE = (
    "<style>:root{--ink:#1b2430;--muted:#697586;--grid:#e3e7ec;--missing:#dde2e8}"
    "@media (prefers-color-scheme:dark){:root{--ink:#e8ecf1;--muted:#9aa7b6;--grid:#2b343f;--missing:#323c48}}"
    "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif!important}</style>"
)
# Okabe and Ito's palette (jfly.uni-koeln.de/color): safe for the colour-blind; mid-tones, for both themes.
PALETTE = ("#2b8ac6", "#e08a00", "#0f9f78", "#c9679b", "#c2571a", "#55aadd", "#a39a12")
OTHER = "#8b96a5"
OF_MODALITY = {"spikes": PALETTE[0], "traces": PALETTE[2], "behavior": PALETTE[1], "stimulus": PALETTE[3]}

WIDTH_IN, LEFT_IN, RIGHT_IN = 11.0, 1.75, 0.55
RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "brainloom",
    "text.parse_math": False,  # a `$` in a name is no formula
    "font.size": 8.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "ytick.major.size": 0,
    "savefig.dpi": 150,
}

Floats = npt.NDArray[np.float64]


def clean(text: str, most: int = 24) -> str:
    """A name as it may stand in a picture: printable, and short."""
    printable = "".join(letter if letter.isprintable() else "·" for letter in text)
    return printable if len(printable) <= most else f"{printable[: most - 1]}…"


def counted(number: int, word: str) -> str:
    """`1 unit`, `2,000 units`."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def picture(title: str, figure: Figure) -> dict[str, str]:
    """A title and a data URI."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for stand_in, name in THEME.items():
        text = text.replace(stand_in, f"var(--{name})")
    text = text.replace("<defs>", f"{STYLE}<defs>", 1)
    return {"title": title, "uri": f"data:image/svg+xml;base64,{base64.b64encode(text.encode()).decode()}"}


def region_colors(regions: Sequence[str]) -> dict[str, str]:
    """A colour for each region: the most frequent ones have their own, the others share a grey."""
    common = [name for name, _ in sorted(Counter(regions).items(), key=lambda item: (-item[1], item[0])) if name]
    return {name: PALETTE[i] if i < len(PALETTE) else OTHER for i, name in enumerate(common)} | {"": OTHER}


# ---------------------------------------------------------------- units


def distributions(units: UnitColumns) -> Figure | None:
    """Firing rates, skewness of traces, quality, regions, depth: a plot for each that is known of any unit."""
    drawn: list[tuple[str, Any]] = []
    rates = units.rate_hz[np.isfinite(units.rate_hz) & (units.rate_hz > 0)]
    if len(rates):
        drawn.append((f"firing rate of {counted(len(rates), 'unit')}", lambda axes: _rates(axes, rates)))
    skewness = units.skewness[np.isfinite(units.skewness)]
    if len(skewness):
        drawn.append(
            (f"skewness of {counted(len(skewness), 'trace')}", lambda axes: _histogram(axes, skewness, "skewness"))
        )
    if any(units.quality):
        drawn.append(("quality", lambda axes: _bars(axes, units.quality, {}, "not given")))
    if any(units.region):
        drawn.append(("region", lambda axes: _bars(axes, units.region, region_colors(units.region), "not known")))
    depth = units.depth_um[np.isfinite(units.depth_um)]
    if len(depth):
        drawn.append((f"depth of {counted(len(depth), 'unit')}", lambda axes: _depth(axes, depth)))
    if not drawn:
        return None
    height = 2.4
    figure = Figure(figsize=(WIDTH_IN, height))
    for i, (title, draw) in enumerate(drawn):
        left = (i + 0.3) / max(3, len(drawn))
        axes = figure.add_axes((left, 0.5 / height, 0.64 / max(3, len(drawn)), 1.6 / height))
        axes.tick_params(length=0)
        axes.set_title(title, loc="left", fontsize=9, fontweight="bold", color=INK)
        draw(axes)
    return figure


def _rates(axes: Axes, rates: npt.NDArray[np.float32]) -> None:
    edges = np.logspace(-2.5, 2.5, 36)
    axes.stairs(np.histogram(np.clip(rates, edges[0], edges[-1]), edges)[0], edges, fill=True, color=PALETTE[0])
    axes.set_xscale("log")
    axes.set_xticks([0.01, 0.1, 1, 10, 100], ["0.01", "0.1", "1", "10", "100"])
    axes.minorticks_off()
    axes.axvline(float(np.median(rates)), color=INK, linewidth=1)
    axes.set_xlabel(f"spikes/s (line: median {np.median(rates):.3g})")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))


def _histogram(axes: Axes, values: npt.NDArray[np.float32], unit: str) -> None:
    axes.stairs(*np.histogram(values.astype(np.float64), 30), fill=True, color=PALETTE[2])
    axes.axvline(float(np.median(values)), color=INK, linewidth=1)
    axes.set_xlabel(f"{unit} (line: median {np.median(values):.3g})")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))


def _bars(axes: Axes, names: Sequence[str], colors: Mapping[str, str], unknown: str, most: int = 9) -> None:
    counts = sorted(Counter(names).items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in counts[most:])
    rows = [(clean(name, 16) or unknown, count, colors.get(name, OTHER)) for name, count in counts[:most]]
    rows += [(f"{len(counts) - most} others", rest, OTHER)] if rest else []
    axes.barh(range(len(rows)), [row[1] for row in rows], color=[row[2] for row in rows], height=0.7)
    axes.set_ylim(max(len(rows), 4) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows], color=INK, fontsize=7.5)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_xlabel("units")


def _depth(axes: Axes, depth: npt.NDArray[np.float32]) -> None:
    counts, edges = np.histogram(depth.astype(np.float64), 30)
    axes.stairs(counts, edges, orientation="horizontal", fill=True, color=PALETTE[1])
    axes.invert_yaxis()
    axes.set_ylabel("depth (µm)")
    axes.set_xlabel("units")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))


# ---------------------------------------------------------------- clocks


def clocks(streams: Sequence[Stream], findings: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Jitter of each stream's clock, and residuals of each finding that carries a list of them; None without either."""
    jitter = [(s.spec.name, OF_MODALITY[s.spec.modality], jitter_ms(s)) for s in streams]
    shown = [(name, color, values) for name, color, values in jitter if values is not None][:16]
    residuals = [row for finding in findings for row in residual_rows(finding)][:6]
    if not shown and not residuals:
        return None
    heights = [0.2 * max(2, len(shown)) + 0.75] * bool(shown) + [1.7] * len(residuals)
    figure = Figure(figsize=(WIDTH_IN, sum(heights) + 0.15))
    top = figure.get_figheight()
    draws = [lambda axes: _jitter(axes, shown)] * bool(shown)
    draws += [lambda axes, row=row: _residuals(axes, *row) for row in residuals]  # type: ignore[misc]  # as in stimulus_tables.py: a lambda with a default
    for height, draw in zip(heights, draws, strict=True):
        box = (LEFT_IN / WIDTH_IN, (top - height + 0.42) / figure.get_figheight())
        size = (1 - (LEFT_IN + RIGHT_IN) / WIDTH_IN, (height - 0.72) / figure.get_figheight())
        draw(figure.add_axes((*box, *size)))
        top -= height
    return figure


def jitter_ms(stream: Stream) -> Floats | None:
    """Median, 99.9th percentile and maximum of |interval between tokens - their median|; None where it has no clock."""
    if stream.spec.kind in ("counts", "event") or len(stream.start_ns) < 3:
        return None
    steps = np.diff(stream.start_ns).astype(np.float64)
    deviation = np.abs(steps - np.median(steps)) / 1e6
    return np.percentile(deviation, [50, 99.9, 100])


def residual_rows(finding: Mapping[str, Any]) -> list[tuple[str, str, Floats, Floats, str]]:
    """(title, x label, x, y, y label) of each list of residuals in a finding; x: its list of the same length in s."""
    lists = {name: np.asarray(value, float) for name, value in finding["numbers"].items() if isinstance(value, list)}
    rows = []
    for name, y in lists.items():
        if "residual" in name and len(y):
            times = [key for key, x in lists.items() if key.endswith("_s") and key != name and len(x) == len(y)]
            x = lists[times[0]] if times else np.arange(len(y), dtype=float)
            title = f"{clean(finding['code'])} · {clean(finding['path'], 70)}"
            rows.append((title, times[0] if times else "number of the knot", x, y, name))
    return rows


def _jitter(axes: Axes, rows: Sequence[tuple[str, str, Floats]]) -> None:
    floor = 1e-3  # 1 µs: less is no jitter that a recording could have
    words = ("≤ 1 µs", "10 µs", "100 µs", "1 ms", "10 ms", "100 ms", "1 s", "10 s", "100 s")
    largest_ms = max(float(values[2]) for _, _, values in rows)
    num_ticks = int(np.clip(np.ceil(np.log10(max(largest_ms, 1.0) / floor)) + 1, 4, len(words)))
    for y, (_, color, values) in enumerate(rows):
        middle, most, largest = np.clip(values, floor, floor * 10.0 ** (num_ticks - 1))
        axes.plot([middle, most], [y, y], color=color, linewidth=4, alpha=0.45, solid_capstyle="butt")
        axes.plot([middle], [y], "|", color=color, ms=9, mew=2)
        axes.plot([largest], [y], "o", color=color, ms=4)
    axes.set_xscale("log")
    axes.set_xlim(floor / 1.6, floor * 10.0 ** (num_ticks - 1) * 1.6)
    axes.set_xticks([floor * 10.0**i for i in range(num_ticks)], words[:num_ticks])
    axes.minorticks_off()
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.set_ylim(max(2, len(rows)) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [clean(name) for name, _, _ in rows], color=INK)
    axes.tick_params(length=0)
    axes.set_title("jitter: how far the time between tokens is from its median", loc="left", fontsize=9, color=INK)
    axes.set_xlabel("tick: median, bar: to the 99.9th percentile, dot: largest")


def _residuals(axes: Axes, title: str, x_label: str, x: Floats, y: Floats, y_label: str) -> None:
    axes.axhline(0, color=GRID, linewidth=1)
    axes.plot(x, y, ".-", color=PALETTE[0], linewidth=0.8, ms=4)
    axes.tick_params(length=0)
    axes.set_title(f"residuals of {title}", loc="left", fontsize=9, color=INK)
    axes.set_xlabel(x_label.replace("_s", " (s)") if x_label.endswith("_s") else x_label)
    axes.set_ylabel(f"{y_label[:-3]} (ms)" if y_label.endswith("_ms") else y_label)
