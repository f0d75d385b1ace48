"""pynapple: every stream of the recording loaded whole. It writes no store: this is its reading alone.

In: a recording. Out: the cost on stdout.
"""

import sys
from pathlib import Path

import numpy as np
import pynapple as nap

sys.path.insert(0, str(Path(__file__).parents[1]))
from measure import measured


def load(recording: Path) -> None:
    """Load units, traces, behaviour and the film."""
    file = nap.NWBFile(str(recording), lazy_loading=False)
    units = file["units"]
    for number in list(units.keys()):
        np.asarray(units[number].index)
    for name in ("roi", "running", "pupil", "position", "film", "film_frames"):
        if name in list(file.keys()):
            np.asarray(file[name].values)
        else:
            print(f"pynapple does not see {name}")


if __name__ == "__main__":
    with measured():
        load(Path(sys.argv[1]))
