"""Features of units that need single spikes: how regular the intervals are, and how often they come in bursts.

In: the streams of spikes and the train split. Out: columns settings.SPIKE_FEATURES of the unit table.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from prep.looks import SPIKES, look
from prep.nwb.file import holding, open_file
from prep.nwb.invalid import ValidTokens
from prep.nwb.spikes import SpikeReader
from prep.plan import PlannedStream, TokenReader, Units
from prep.settings import SPIKE_FEATURES, to_ns

Index = npt.NDArray[np.int64]
Block = tuple[int, int, str]  # [start_ns, stop_ns), label

BURST_NS = 10_000_000
FEWEST_INTERVALS = 10  # of fewer nothing is said
LIMIT = 10.0


def with_spike_features(units: Units, streams: Sequence[PlannedStream], splits: Sequence[Block]) -> Units:
    """The unit table with `spike_features` (U, 2), NaN where a unit has too few intervals; as it was without spikes.

    Only intervals wholly inside one train block count, and, where times of
    observation are known, inside one stretch of them; and no invalid time may lie in them.
    """
    train = np.array([(start, stop) for start, stop, label in splits if label == "train"], np.int64).reshape(-1, 2)
    result = np.full((len(units.unit_key), len(SPIKE_FEATURES)), np.nan, np.float32)
    has_spikes = False
    for stream in streams:
        reader: TokenReader = stream.reader
        pieces = train[np.argsort(train[:, 0])]
        if isinstance(reader, ValidTokens):
            pieces = _without(pieces, reader.spans)
            reader = reader.reader
        if isinstance(reader, SpikeReader) and stream.spec.first_unit is not None:
            rows = slice(stream.spec.first_unit, stream.spec.first_unit + stream.spec.num_sources)
            result[rows] = look(SPIKES, interval_features, reader, pieces)
            has_spikes = True
    return replace(units, spike_features=result) if has_spikes else units


def _without(blocks: Index, spans: Index) -> Index:
    """Blocks (B, 2) less spans (M, 2), both in order of time and apart from each other."""
    pieces = []
    for start, stop in blocks.tolist():
        for begin, end in spans[(spans[:, 1] > start) & (spans[:, 0] < stop)].tolist():
            pieces.append((start, begin))
            start = end
        pieces.append((start, stop))
    return np.array([(start, stop) for start, stop in pieces if start < stop], np.int64).reshape(-1, 2)


def interval_features(reader: SpikeReader, train: Index) -> npt.NDArray[np.float32]:
    """(U, 2): coefficient of variation of the intervals between spikes, and the share of them below 10 ms.

    `train`: blocks (B, 2) of [start, stop) in ns, in order of time.
    """
    num_units = reader.times.num_units
    count, bursts, total, squares = (np.zeros(num_units) for _ in range(4))
    with holding((reader.times.path, reader.times.dataset)), open_file(reader.times.path) as file:
        for time_s, unit, num_old in reader.times.blocks_in_order(file):
            begin = max(0, num_old - 1)  # an interval needs the spike before
            interval_ns, of_unit = _intervals(reader, to_ns(time_s[begin:]), unit[begin:], train)
            if not len(interval_ns):
                continue
            first = np.flatnonzero(np.diff(of_unit, prepend=-1))  # units come one after the other
            own, interval_s = of_unit[first], interval_ns / 1e9
            count[own] += np.diff(first, append=len(of_unit))
            bursts[own] += np.add.reduceat(interval_ns < BURST_NS, first, dtype=np.int64)
            total[own] += np.add.reduceat(interval_s, first)
            squares[own] += np.add.reduceat(interval_s * interval_s, first)
    enough = (count >= FEWEST_INTERVALS) & (total > 0)
    size = np.where(enough, count, 1.0)
    mean = np.where(enough, total / size, 1.0)
    std = np.sqrt(np.maximum(squares / size - mean**2, 0.0))
    features = np.stack([np.minimum(std / mean, LIMIT), bursts / size], axis=1)
    return np.where(enough[:, None], features, np.nan).astype(np.float32)


def _intervals(reader: SpikeReader, time_ns: Index, unit: Index, train: Index) -> tuple[Index, Index]:
    """Intervals (n,) between spikes in ns, and the unit (n,) of each."""
    if ((np.diff(time_ns) < 0) & (np.diff(unit) == 0)).any():
        order = np.lexsort((time_ns, unit))
        time_ns, unit = time_ns[order], unit[order]
    block = np.searchsorted(train[:, 0], time_ns, side="right") - 1
    in_train = (block >= 0) & (time_ns < train[np.maximum(block, 0), 1]) if len(train) else np.zeros(len(block), bool)
    together = in_train[1:] & in_train[:-1] & (np.diff(block) == 0) & (np.diff(unit) == 0)
    if reader.observed is not None:
        place = reader.observed.place(time_ns, unit)
        together &= (np.diff(place) == 0) & (place[1:] >= 0)
    return np.diff(time_ns)[together], unit[1:][together]
