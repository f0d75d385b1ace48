"""Pictures of the report: one aligned overview of a session, distributions of its units, its clocks.

In: an open session of a store, or columns of units. Out: SVG as data URIs that follow the light or dark theme.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from prep.report_data import UnitColumns
from prep.report_plots import (
    GRID,
    INK,
    LEFT_IN,
    MUTED,
    OF_MODALITY,
    OTHER,
    PALETTE,
    RC,
    RIGHT_IN,
    WIDTH_IN,
    Floats,
    clean,
    clocks,
    counted,
    distributions,
    picture,
    region_colors,
)
from prep.report_stretch import (
    Stretch,
    bars_inside,
    choose_stretch,
    count_image,
    frame_at,
    trace_image,
    trace_samples,
)
from prep.settings import ACTIVITY
from prep.store import Session, Store, Stream

TOP_IN, BOTTOM_IN, GAP_IN = 0.62, 0.36, 0.09
MAX_ACTIVITY, MAX_BEHAVIOR, MAX_FRAMES, MAX_TYPES, MAX_TABLES = 4, 8, 2, 14, 4  # panels, and rows, of an overview
MAX_UNITS, MAX_LINES, MAX_CHANNELS = 160, 16, 4
MAX_SAMPLES = 4_000_000  # that one panel reads: 32 MB
MAX_POINTS = 12_000  # of one panel drawn as lines; beyond it the lines are pixels
IMAGE_COLUMNS, THUMBNAIL_PX = 900, 96


@dataclass
class Panel:
    """One row of the overview: its height, and what draws it."""

    height_in: float
    label: str
    notes: list[tuple[str, str]]  # below the label: (text, colour), side by side
    draw: Any  # called with the Axes


def session_pictures(store: Store, session: Session, units: UnitColumns) -> list[dict[str, str]]:
    """Overview, distributions and clocks of one session, those for which it has data."""
    streams = [session.stream(name) for name in session.stream_names]
    with matplotlib.rc_context(RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the measuring font lacks
        figures = {
            "Everything on one time axis": overview(store, session, streams, units),
            "Units": distributions(units),
            "Clocks": clocks(streams, session.attributes["findings"]),
        }
        return [picture(title, figure) for title, figure in figures.items() if figure is not None]


def dataset_picture(title: str, units: UnitColumns) -> dict[str, str] | None:
    """Distributions of the units of a dataset; None where nothing is known of any."""
    with matplotlib.rc_context(RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # likewise
        figure = distributions(units)
        return None if figure is None else picture(title, figure)


# ---------------------------------------------------------------- the overview


def overview(store: Store, session: Session, streams: Sequence[Stream], units: UnitColumns) -> Figure | None:
    """Stimulus, events, activity and behaviour over the same 24 s; None where no stream has a token."""
    stretch = choose_stretch(streams)
    if stretch is None:
        return None
    colors = region_colors(units.region)
    panels = _panels(store, session, streams, units.region, colors, stretch)
    if not panels:
        return None
    height = TOP_IN + BOTTOM_IN + sum(panel.height_in + GAP_IN for panel in panels)
    figure = Figure(figsize=(WIDTH_IN, height))
    width = (WIDTH_IN - LEFT_IN - RIGHT_IN) / WIDTH_IN
    top = height - TOP_IN
    for panel in panels:
        top -= panel.height_in
        axes = figure.add_axes((LEFT_IN / WIDTH_IN, top / height, width, panel.height_in / height))
        top -= GAP_IN
        axes.set_xlim(*stretch.limits_s)
        axes.set_yticks([])
        axes.grid(axis="x", color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines["bottom"].set_visible(panel is panels[-1])
        axes.xaxis.set_major_locator(MaxNLocator(8))
        axes.tick_params(axis="x", length=0, labelbottom=panel is panels[-1])
        panel.draw(axes)
        _label(axes, panel)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_xlabel("session time (s)")
    _heading(figure, session, colors, height)
    return figure


def _label(axes: Axes, panel: Panel) -> None:
    """The stream's name left of its panel, and below it its notes, right-aligned."""
    step = 0.075 / panel.height_in if panel.notes else 0
    x = -0.012
    axes.text(x, 0.5 + step, clean(panel.label), transform=axes.transAxes, ha="right", va="center", color=INK)
    for note, color in reversed(panel.notes):
        axes.text(x, 0.5 - step, note, transform=axes.transAxes, ha="right", va="center", color=color, fontsize=7.2)
        x -= 0.0058 * len(note) + 0.008


def _heading(figure: Figure, session: Session, colors: Mapping[str, str], height: float) -> None:
    entry = session.entry
    title = f"{clean(entry['dataset_id'], 40)} / {clean(entry['session_id'], 60)}"
    figure.text(LEFT_IN / WIDTH_IN, 1 - 0.22 / height, title, fontsize=10.5, fontweight="bold", va="center")
    x = LEFT_IN / WIDTH_IN
    named = [(name, color) for name, color in colors.items() if name and color != OTHER]
    is_shared = any(color == OTHER for name, color in colors.items() if name)
    legend = [*named, *([("other regions", OTHER)] if is_shared else []), *([("", OTHER)] if not named else [])]
    for name, color in legend:
        text = clean(name, 28) or ("region not known" if entry["num_units"] else "")
        figure.text(x, 1 - 0.44 / height, text, color=color, fontsize=8, va="center", fontweight="bold")
        x += (0.28 + 0.068 * len(text)) / WIDTH_IN


def _panels(
    store: Store,
    session: Session,
    streams: Sequence[Stream],
    regions: Sequence[str],
    colors: Mapping[str, str],
    stretch: Stretch,
) -> list[Panel]:
    shown = [s for s in streams if s.spec.num_sources and (part := stretch.tokens(s)).stop > part.start]
    frames = [s for s in shown if s.spec.kind == "frames" and s.spec.stimulus in store.catalog["stimuli"]]
    events = [s for s in shown if s.spec.kind == "event"]
    activity = [s for s in shown if s.spec.modality in ACTIVITY and s.spec.kind in ("counts", "trace")]
    activity.sort(key=lambda s: -s.spec.num_sources)
    others = [s for s in shown if s.spec.kind == "trace" and s.spec.modality not in ACTIVITY]
    panels = [_frames_panel(store, stream, stretch) for stream in frames[:MAX_FRAMES]]
    rows = _event_rows(session, events, stretch)
    panels += [_events_panel(rows)] if rows else []
    panels += [_activity_panel(stream, stretch, regions, colors) for stream in activity[:MAX_ACTIVITY]]
    return panels + [_behavior_panel(stream, stretch) for stream in others[:MAX_BEHAVIOR]]


def _frames_panel(store: Store, stream: Stream, stretch: Stretch) -> Panel:
    pixels = store.frames(str(stream.spec.stimulus))
    aspect = pixels.spec.shape[2] / pixels.spec.shape[1]
    height = 0.72
    start_s, stop_s = stretch.limits_s
    number = int(np.clip((WIDTH_IN - LEFT_IN - RIGHT_IN) / (height * aspect * 1.06), 1, 16))
    slot_s = (stop_s - start_s) / number

    def draw(axes: Axes) -> None:
        axes.set_ylim(0, 1)
        for i in range(number):
            begin = start_s + i * slot_s
            frame = frame_at(stream, begin + slot_s / 2)
            if 0 <= frame < pixels.spec.shape[0]:
                image = _thumbnail(pixels.read(frame, frame + 1)[0])
                extent = (begin + 0.03 * slot_s, begin + 0.97 * slot_s, 0, 1)
                axes.imshow(image, cmap="gray", vmin=0, vmax=255, extent=extent, aspect="auto")
        axes.set_xlim(start_s, stop_s)

    return Panel(height, stream.spec.name, [("frame at its middle", MUTED)], draw)


def _thumbnail(frame: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A frame (H, W[, C]) with fewer pixels; three channels are colours, else the first one is brightness."""
    step = max(1, -(-max(frame.shape[:2]) // (2 * THUMBNAIL_PX)))
    small = frame[::step, ::step]
    return small if small.ndim == 2 or small.shape[2] == 3 else small[:, :, 0]


def _event_rows(session: Session, streams: Sequence[Stream], stretch: Stretch) -> list[tuple[str, str, Floats]]:
    """(name, colour, bars (n, 2) in seconds): tables of intervals, then the most frequent types of events."""
    rows: list[tuple[str, str, Floats]] = []
    for name in session.entry["intervals"]:
        bars = bars_inside(session, name, stretch)
        if len(bars) and len(rows) < MAX_TABLES:
            rows.append((name, OTHER, bars))
    typed: dict[tuple[str, str], list[Floats]] = {}
    for stream in streams:
        tokens = stretch.tokens(stream)
        spec, types = stream.spec, np.asarray(stream.types)[tokens]
        length = stream.read(tokens)[:, 0, spec.fields.index("duration_s")] if "duration_s" in spec.fields else 0.0
        starts = stream.start_ns[tokens] / 1e9
        stops = np.clip(starts + np.nan_to_num(length, nan=0.0, posinf=0.0, neginf=0.0), starts, stretch.limits_s[1])
        bars = np.stack([starts, stops], axis=1)
        for code in np.unique(types):
            typed.setdefault((spec.types[code], OF_MODALITY[spec.modality]), []).append(bars[types == code])
    merged = [(name, color, np.concatenate(parts)) for (name, color), parts in typed.items()]
    return rows + sorted(merged, key=lambda row: -len(row[2]))[:MAX_TYPES]


def _events_panel(rows: Sequence[tuple[str, str, Floats]]) -> Panel:
    def draw(axes: Axes) -> None:
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [clean(name) for name, _, _ in rows])
        for tick, (_, color, _) in zip(axes.get_yticklabels(), rows, strict=True):
            tick.set_color(INK if color == OTHER else color)
        for y, (_, color, bars) in enumerate(rows):
            wide = bars[:, 1] > bars[:, 0]
            spans = np.stack([bars[wide, 0], bars[wide, 1] - bars[wide, 0]], axis=1)
            axes.broken_barh(spans.tolist(), (y - 0.32, 0.64), facecolors=color, alpha=0.35, linewidth=0)
            axes.vlines(bars[:, 0], y - 0.36, y + 0.36, colors=color, linewidth=1.2)

    return Panel(0.185 * len(rows) + 0.05, "", [], draw)


def _activity_panel(stream: Stream, stretch: Stretch, regions: Sequence[str], colors: Mapping[str, str]) -> Panel:
    spec = stream.spec
    first = spec.first_unit
    place = range(spec.num_sources)
    region = ["" if first is None else regions[first + i] for i in place]
    rank = {name: number for number, name in enumerate(colors)}
    order = sorted(place, key=lambda i: (rank[region[i]], i))
    tokens = stretch.tokens(stream)
    room = max(1, MAX_SAMPLES // max(1, (tokens.stop - tokens.start) * spec.samples_per_token))
    number = min(MAX_UNITS, len(order), room)
    few = np.array([order[int(i)] for i in np.linspace(0, len(order) - 1, number)], np.int64)
    tints = [colors[region[int(i)]] for i in few]
    is_few = spec.kind == "trace" and len(few) <= MAX_LINES
    word = {"counts": "unit", "trace": "trace"}[spec.kind]
    note = f"{len(few):,} of " * (len(few) < len(order)) + counted(len(order), word)
    height = float(np.clip(0.16 * len(few), 0.5, 2.4)) if is_few else float(np.clip(0.045 * len(few), 0.8, 3.0))

    def draw(axes: Axes) -> None:
        if is_few:
            _stacked_lines(axes, stream, stretch, few, tints)
        else:
            _raster(axes, stream, stretch, few, tints)

    return Panel(height, spec.name, [(note, MUTED)], draw)


def _raster(axes: Axes, stream: Stream, stretch: Stretch, few: npt.NDArray[np.int64], tints: Sequence[str]) -> None:
    """Units as rows of pixels: the more spikes in a bin, or the higher a trace, the less transparent."""
    if stream.spec.kind == "counts":
        image = count_image(stream, stretch, few)
        alpha = np.where(image > 0, np.clip(0.62 + 0.19 * image, 0, 1), 0)
    else:
        image = trace_image(stream, stretch, few, IMAGE_COLUMNS)
        level = (image - stream.mean[few, None]) / stream.scale[few, None]
        alpha = np.clip((level - 0.3) / 3.2, 0, 1)
    is_missing = np.isnan(image)
    pixels = np.empty((*image.shape, 4))
    pixels[:, :, :3] = np.array([to_rgb(tint) for tint in tints])[:, None]
    pixels[:, :, 3] = np.where(is_missing, 0, alpha)
    pixels[is_missing] = (0.55, 0.6, 0.66, 0.28)
    start_s, stop_s = stretch.limits_s
    axes.imshow(pixels, extent=(start_s, stop_s, len(few), 0), aspect="auto", interpolation="none")


def _stacked_lines(
    axes: Axes, stream: Stream, stretch: Stretch, few: npt.NDArray[np.int64], tints: Sequence[str]
) -> None:
    time_s, values = trace_samples(stream, stretch.tokens(stream), few)
    level = (values - stream.mean[few]) / stream.scale[few]
    is_heavy = level.size > MAX_POINTS
    for row, tint in enumerate(tints):
        axes.plot(time_s[:, row], level[:, row] - 5.0 * row, color=tint, linewidth=0.9, rasterized=is_heavy)
    axes.set_ylim(-5.0 * len(few) + 2, 7)


def _behavior_panel(stream: Stream, stretch: Stretch) -> Panel:
    spec = stream.spec
    channels = np.arange(min(spec.num_sources, MAX_CHANNELS))
    shades = [OF_MODALITY[spec.modality], PALETTE[0], PALETTE[2], PALETTE[3]]
    notes = [(clean(spec.unit, 16), MUTED)] if spec.unit not in ("", "n.a.") else []
    if spec.num_sources > 1:
        names = [name.rsplit("/", 1)[-1] for name in spec.channels[: len(channels)]]
        notes += [(clean(name, 10), shade) for name, shade in zip(names, shades, strict=False)]
    notes += [(f"+{spec.num_sources - MAX_CHANNELS}", MUTED)] if spec.num_sources > MAX_CHANNELS else []

    def draw(axes: Axes) -> None:
        time_s, values = trace_samples(stream, stretch.tokens(stream), channels)
        is_heavy = values.size > MAX_POINTS
        marker = "." if len(values) < 30 else None
        for i in channels:
            color = shades[i % len(shades)]
            axes.plot(time_s[:, i], values[:, i], color=color, linewidth=1, marker=marker, ms=3, rasterized=is_heavy)
        seen = values[np.isfinite(values)]
        if len(seen) and seen.max() > seen.min():
            axes.set_yticks([float(seen.min()), float(seen.max())], [f"{seen.min():.3g}", f"{seen.max():.3g}"])
            axes.yaxis.tick_right()
            axes.tick_params(axis="y", pad=2, labelsize=6.8)
            low, high = axes.get_yticklabels()
            low.set_verticalalignment("bottom")
            high.set_verticalalignment("top")

    return Panel(0.52, spec.name, notes, draw)
