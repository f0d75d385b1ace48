"""Tables for people: columns aligned; on a terminal the last column is folded, in a pipe one row is one line.

In: a header and rows of texts. Out: lines.
"""

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence

NARROWEST = 30  # a last column with less room than this goes below its row
INDENT = 4


def table_lines(
    header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = (), width: int | None = None
) -> list[str]:
    """One line per row, more where the last column is folded to `width`; columns named in `right` are numbers."""
    cells = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    begin = sum(widths[:-1]) + 2 * (len(widths) - 1)
    is_below = width is not None and width - begin < NARROWEST
    indent = INDENT if is_below else begin
    lines = []
    for *first, last in cells:
        padded = zip(header, first, widths, strict=False)
        start = "  ".join(text.rjust(size) if name in right else text.ljust(size) for name, text, size in padded)
        folded = [last] if width is None else textwrap.wrap(last, max(NARROWEST, width - indent))
        inline = "" if is_below or not folded else folded.pop(0)
        lines += [f"{start}  {inline}".rstrip(), *(" " * indent + text for text in folded)]
    return lines


def terminal_width() -> int | None:
    """Columns of the terminal that we print to; None where it is none: a log, a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
