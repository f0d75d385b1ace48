"""What pictures of a page share: colours that follow its light or dark theme, and SVG inside the page.

In: figures. Out: data URIs.
"""

import base64
import io

from matplotlib.figure import Figure

# Stand-ins in the drawing that become CSS variables, so that one SVG is right on white and on black.
THEME = {"#010203": "ink", "#010204": "muted", "#010205": "grid"}
INK, MUTED, GRID = THEME
STYLE = (
    "<style>:root{--ink:#1b2430;--muted:#697586;--grid:#e3e7ec}"
    "@media (prefers-color-scheme:dark){:root{--ink:#e8ecf1;--muted:#9aa7b6;--grid:#2b343f}}"
    "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif!important}</style>"
)
# Okabe and Ito's palette (jfly.uni-koeln.de/color): safe for the colour-blind; mid-tones, for both themes.
PALETTE = ("#2b8ac6", "#e08a00", "#0f9f78", "#c9679b", "#c2571a", "#55aadd", "#a39a12", "#8b96a5")
OF_MODALITY = {"spikes": PALETTE[0], "traces": PALETTE[2], "behavior": PALETTE[1], "events": PALETTE[3]}
WIDTH_IN = 11.0
RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "brainloom",
    "text.parse_math": False,  # a `$` in a name is no formula
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "legend.frameon": False,
    "legend.labelcolor": MUTED,
    "savefig.dpi": 150,
}


def data_uri(figure: Figure) -> str:
    """The figure as SVG, themed, in a URI."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for stand_in, name in THEME.items():
        text = text.replace(stand_in, f"var(--{name})")
    text = text.replace("<defs>", f"{STYLE}<defs>", 1)
    return f"data:image/svg+xml;base64,{base64.b64encode(text.encode()).decode()}"
