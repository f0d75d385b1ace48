"""The figures of the fixed protocol, each from sums over windows, so that a resampled score costs one addition.

In: truth and prediction, one row per window. Out: `*_rows`, what a window adds; METRICS, figures of a set of windows.

Sources of the definitions: circular R2 is variance-weighted over sin and cos; bits per spike and D2 of counts follow
Pillow et al. (2008) and the Poisson deviance; skill is 1 - MSE / MSE of persistence on traces in units of train's sd.
"""

from collections.abc import Callable

import numpy as np

Rows = dict[str, np.ndarray]  # name: (windows, ...)
Figures = dict[str, float]
LOWEST_RATE = 1e-9  # expected counts per bin; a zero would cost infinitely much
BANDS_MS = ((0, 100), (100, 300), (300, 500))
FLAT = 1e-4  # of train's sd: a prediction that varies less has no correlation
BIN_MS = 20


def rows_at(rows: Rows, index: np.ndarray) -> Rows:
    """Some windows, in any order and number."""
    return {name: array[index] for name, array in rows.items()}


# ---------------------------------------------------------------- angles and places


def angle_rows(truth: np.ndarray, predicted: np.ndarray) -> Rows:
    """Angles in rad."""
    error = np.abs((predicted - truth + np.pi) % (2 * np.pi) - np.pi)
    vectors = [np.stack([np.cos(angle), np.sin(angle)], 1) for angle in (truth, predicted)]
    return {"error": np.degrees(error), **_square_rows(*vectors)}


def angle_figures(rows: Rows) -> Figures:
    """Median and mean absolute error in degrees, circular R2."""
    error = rows["error"]
    return {"mdae_deg": float(np.median(error)), "mae_deg": float(error.mean()), "r2_circ": _r2(rows)}


def place_rows(truth: np.ndarray, predicted: np.ndarray) -> Rows:
    """(windows, 2) in m."""
    return {"error": 100 * np.hypot(*(truth - predicted).T), **_square_rows(truth, predicted)}


def place_figures(rows: Rows) -> Figures:
    """R2 over both axes, median error in cm."""
    return {"r2": _r2(rows), "err_med_cm": float(np.median(rows["error"]))}


def _square_rows(truth: np.ndarray, predicted: np.ndarray) -> Rows:
    return {"truth": truth, "squared": truth**2, "residual": (truth - predicted) ** 2}


def _r2(rows: Rows) -> float:
    spread = rows["squared"].sum() - (rows["truth"].sum(0) ** 2).sum() / len(rows["truth"])
    return float(1 - rows["residual"].sum() / spread)


# ---------------------------------------------------------------- counts


def count_rows(counts: np.ndarray, rate: np.ndarray, train_mean: np.ndarray, bands: bool = False) -> Rows:
    """(windows, bins, units) spikes and expected spikes per bin, (units,) the mean of train per bin; sums over bins."""
    edges = [start // BIN_MS for start, _ in BANDS_MS] if bands else [0]

    def add(array: np.ndarray) -> np.ndarray:
        return np.add.reduceat(array, edges, axis=1)

    train_mean = np.broadcast_to(train_mean, counts.shape)
    return {
        "spikes": add(counts.astype(float)),
        "bins": add(np.ones(counts.shape)),
        "cost": add(_cost(rate, counts)),
        "cost_of_train": add(_cost(train_mean, counts)),
        "cost_of_truth": add(_cost(counts, counts)),
    }


def _cost(rate: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Poisson negative log likelihood in nats, without the part that only the counts decide."""
    rate = np.where(rate <= 0, LOWEST_RATE, rate)
    return rate - counts * np.log(rate)


def count_figures(rows: Rows) -> Figures:
    """Bits per spike over the mean of train, and of these windows; D2; of a forecast the bits by horizon too."""
    figures = _count_figures({name: array.sum(1) for name, array in rows.items()})
    if rows["spikes"].shape[1] > 1:
        for band, (start, stop) in enumerate(BANDS_MS):
            of_band = _count_figures({name: array[:, band] for name, array in rows.items()})
            figures[f"bps_train_{start}-{stop}ms"] = of_band["bps_train"]
    return figures


def _count_figures(rows: Rows) -> Figures:
    total = {name: array.sum(0) for name, array in rows.items()}
    total = {name: array[total["spikes"] > 0] for name, array in total.items()}  # units that fired
    spikes = total["spikes"]
    null = spikes - spikes * np.log(spikes / total["bins"])
    deviance, most = total["cost"] - total["cost_of_truth"], null - total["cost_of_truth"]
    bits = spikes.sum() * np.log(2)
    return {
        "bps_train": float((total["cost_of_train"] - total["cost"]).sum() / bits),
        "bps_nlb": float((null - total["cost"]).sum() / bits),
        "d2": float((1 - deviance / most).mean()),
        "d2_pooled": float(1 - deviance.sum() / most.sum()),
    }


# ---------------------------------------------------------------- traces


def trace_rows(truth: np.ndarray, predicted: np.ndarray, last: np.ndarray) -> Rows:
    """(windows, frames, ROIs), and (windows, ROIs) the last seen frame, all in units of train's mean and sd."""
    change, predicted_change = truth - last[:, None], predicted - last[:, None]
    return {
        "residual": ((truth - predicted) ** 2).sum(1),
        "persistence": (change**2).sum(1),
        **{f"trace_{name}": array for name, array in _moments(truth, predicted).items()},
        **{f"change_{name}": array for name, array in _moments(change, predicted_change).items()},
    }


def _moments(truth: np.ndarray, predicted: np.ndarray) -> Rows:
    products = {"y": truth, "p": predicted, "yy": truth**2, "pp": predicted**2, "yp": truth * predicted}
    return {"n": np.full(truth[:, 0].shape, float(truth.shape[1]))} | {k: v.sum(1) for k, v in products.items()}


def trace_figures(rows: Rows) -> Figures:
    """Correlation of traces and of their changes, R2 and skill against persistence."""
    total = {name: array.sum(0) for name, array in rows.items()}
    num = total["trace_n"]
    spread = total["trace_yy"] - total["trace_y"] ** 2 / num
    return {
        "r": _correlation(total, "trace", 1e-7),
        "r_change": _correlation(total, "change", FLAT),
        "r2_vs_testmean": float((1 - total["residual"] / spread).mean()),
        "skill_vs_persistence": float(1 - total["residual"].sum() / total["persistence"].sum()),
        "skill_roi_mean": float((1 - total["residual"] / total["persistence"]).mean()),
    }


def _correlation(total: Rows, of: str, flat: float) -> float:
    """Mean over ROIs; 0 where the prediction does not vary."""
    num, y, p, yy, pp, yp = (total[f"{of}_{name}"] for name in ("n", "y", "p", "yy", "pp", "yp"))
    covariance, var_y, var_p = yp / num - y * p / num**2, yy / num - (y / num) ** 2, pp / num - (p / num) ** 2
    varies = var_p > flat**2
    return float(np.where(varies, covariance / np.sqrt(np.where(varies, var_y * var_p, 1.0)), 0.0).mean())


METRICS: dict[str, Callable[[Rows], Figures]] = {
    "hd": angle_figures,
    "pos": place_figures,
    "cosmooth": count_figures,
    "forecast": count_figures,
    "forecast_ca": trace_figures,
}
