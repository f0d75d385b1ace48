"""Band-limited power of voltages: causal band-pass filters, squared, averaged in bins; numpy and scipy, no files.

In: samples (n, C) in volts at a steady rate, bands in Hz, bins as rows of samples. Out: log10 power (bins, C, bands).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.plan import PrepError

Float64 = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]

ORDER = 2  # of the Butterworth low-pass prototype: 12 dB per octave on either side of the band
SETTLED = 1e-2  # an onset has decayed to this where a bin counts as observed
FORGOTTEN = 1e-9  # and to this over the samples that are filtered before the first that counts
MICROVOLTS2 = 1e12  # of one V^2
FLOOR_UV2 = 1e-6  # (1 nV)^2, below any amplifier's noise; a channel that is zero gets log10 of it
UNIT = "log10(uV^2)"


@dataclass(frozen=True, kw_only=True)
class Band:
    """One causal band-pass filter at one sampling rate."""

    low_hz: float
    high_hz: float
    sections: Float64  # (ORDER, 6) second-order sections
    settle_samples: int  # what an onset takes to decay to SETTLED
    warm_samples: int  # and to FORGOTTEN


def design(low_hz: float, high_hz: float, rate_hz: float) -> Band:
    """A Butterworth band-pass as second-order sections. Raises PrepError where the sampling rate is too low for it."""
    from scipy.signal import butter  # a second to import: workers that meet no voltages do without

    if 2 * high_hz >= rate_hz:
        raise PrepError(
            f"it is sampled at {rate_hz:.6g} Hz, and a band up to {high_hz:g} Hz needs more than {2 * high_hz:g} Hz. "
            "Take the band out of `lfp.bands_hz`, or the series out of `lfp.series`"
        )
    _, poles, _ = butter(ORDER, (low_hz, high_hz), btype="bandpass", fs=rate_hz, output="zpk")
    slowest = float(np.abs(poles).max())
    return Band(
        low_hz=low_hz,
        high_hz=high_hz,
        sections=butter(ORDER, (low_hz, high_hz), btype="bandpass", fs=rate_hz, output="sos"),
        settle_samples=int(np.ceil(np.log(SETTLED) / np.log(slowest))),
        warm_samples=int(np.ceil(np.log(FORGOTTEN) / np.log(slowest))),
    )


def band_power(
    volts: Float64, bands: tuple[Band, ...], starts: Index, stops: Index, num_before: int
) -> npt.NDArray[np.float32]:
    """log10(mean power in uV^2 + FLOOR_UV2) of each bin as (bins, C, bands), NaN where nothing was recorded.

    volts (n, C) may have NaN; bin i holds the rows [starts[i], stops[i]), none where they are equal; num_before rows
    were recorded before the first. Row r of the filtered signal depends on the rows up to r alone, so a bin holds
    nothing of its future. A bin is missing where it follows the start, or a missing sample, by less than the filter's
    onset.
    """
    from scipy.signal import sosfilt, sosfilt_zi  # as above

    missing = ~np.isfinite(volts)
    num_missing = np.concatenate([np.zeros((1, volts.shape[1]), np.int64), np.cumsum(missing, axis=0)])
    volts = np.where(missing, 0.0, volts) if missing.any() else volts
    result = np.full((len(starts), volts.shape[1], len(bands)), np.nan, np.float32)
    filled = np.flatnonzero(stops > starts)
    starts, stops = starts[filled], stops[filled]
    pairs = np.stack([starts, stops], axis=1).ravel()  # reduceat sums between neighbours; every second is a bin
    for i, band in enumerate(bands):
        # The state of a filter that has always seen the first sample: a constant offset makes no onset.
        state: Any = sosfilt_zi(band.sections)[:, :, None] * volts[0]
        filtered, _ = sosfilt(band.sections, volts, axis=0, zi=state)
        squares = np.concatenate([filtered**2, np.zeros((1, volts.shape[1]))])
        power = np.add.reduceat(squares, pairs, axis=0)[::2] / (stops - starts)[:, None]
        value = np.log10(power * MICROVOLTS2 + FLOOR_UV2)
        since = starts - band.settle_samples
        value[num_missing[stops] > num_missing[np.maximum(since, 0)]] = np.nan
        value[since + num_before < 0] = np.nan
        result[filled, :, i] = value
    return result
