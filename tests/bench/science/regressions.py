"""The linear baselines: ridge for headings and traces, a ridge-penalised Poisson GLM for spikes.

In: a Recording, a task, a fold. Out: predictions of the test block; penalties are chosen on the valid block alone.
"""

from collections.abc import Callable

import numpy as np
import torch
from bench.science import protocol, windows
from bench.science.recordings import Recording
from bench.science.windows import Arrays, Problem

HEADING_BIN_S = 0.05
RIDGE = (1.0, 10.0, 100.0, 1e3, 1e4)
POISSON_RIDGE = (0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4)  # from strong to weak, each begins where the last ended
LOWEST = 0.01  # of a unit's mean rate: what a product of many small factors may say at least
BINS_OF_A_BAND = 5  # a forecast has one rate per 100 ms


def ridge(inputs: Arrays, targets: Arrays) -> np.ndarray:
    """(n, targets) of test: least squares with an intercept, the penalty with the least squared error on valid."""
    inputs = {split: np.c_[array.reshape(len(array), -1), np.ones(len(array))] for split, array in inputs.items()}
    inputs = {split: array.astype(np.float64) for split, array in inputs.items()}
    train, valid = inputs["train"], inputs["valid"]
    square, product = train.T @ train, train.T @ targets["train"]
    weights = [np.linalg.solve(square + penalty * np.eye(len(square)), product) for penalty in RIDGE]
    errors = [((valid @ each - targets["valid"]) ** 2).mean() for each in weights]
    return inputs["test"] @ weights[int(np.argmin(errors))]


def poisson_glm(inputs: Arrays, targets: Arrays) -> np.ndarray:
    """(n, targets) expected counts of test; the penalty with the highest likelihood on valid."""
    flat = {split: torch.from_numpy(array.reshape(len(array), -1)) for split, array in inputs.items()}
    counts = {split: torch.from_numpy(array) for split, array in targets.items() if split != "test"}
    mean = counts["train"].mean(0).clamp_min(1e-6)
    weights = torch.zeros(flat["train"].shape[1], len(mean), requires_grad=True)
    bias = mean.log().requires_grad_()
    best, found = np.inf, np.zeros(0)
    for penalty in POISSON_RIDGE:
        _descend(flat["train"], counts["train"], weights, bias, penalty)
        with torch.no_grad():
            cost = poisson_cost(flat["valid"] @ weights + bias, counts["valid"]).item()
            if cost < best:
                rate = torch.maximum((flat["test"] @ weights + bias).exp(), LOWEST * mean)
                best, found = cost, rate.numpy().astype(np.float64)
    return found


def poisson_cost(log_rate: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean negative log likelihood in nats, without the part that only the counts decide."""
    return (log_rate.exp() - counts * log_rate).mean()


def _descend(
    inputs: torch.Tensor, counts: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor, penalty: float
) -> None:
    """To the minimum of a convex cost: the likelihood and the squares of the weights."""
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=40, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        cost = poisson_cost(inputs @ weights + bias, counts) + penalty * (weights**2).sum(0).mean() / 2
        cost.backward()
        return cost

    optimizer.step(closure)


# ---------------------------------------------------------------- the tasks


def predict_heading(recording: Recording, task: str, fold: int | None) -> np.ndarray:
    """cos and sin by ridge on the counts of lagged bins."""
    problem = windows.problem(recording, task, fold, HEADING_BIN_S)
    return ridge(problem.inputs(lambda seen: seen), problem.asked)


def predict_spikes(recording: Recording, task: str, fold: int | None) -> np.ndarray:
    """Held-out units by Poisson GLM on the other units' spikes to both sides."""
    problem = windows.problem(recording, task, fold)
    return poisson_glm(problem.inputs(windows.around), problem.asked)


def predict_future_spikes(recording: Recording, task: str, fold: int | None) -> np.ndarray:
    """All units by Poisson GLM on what was fired last."""
    problem = windows.problem(recording, task, fold)
    bands = {split: _bands(asked) for split, asked in problem.asked.items()}
    rate = poisson_glm(problem.inputs(windows.recent), bands).reshape(
        -1, protocol.NUM_BINS // BINS_OF_A_BAND, recording.num_units
    )
    return np.repeat(rate / BINS_OF_A_BAND, BINS_OF_A_BAND, axis=1)


def _bands(counts: np.ndarray) -> np.ndarray:
    """(n, bands * units): spikes per band of (n, bins, units)."""
    return np.add.reduceat(counts, range(0, counts.shape[1], BINS_OF_A_BAND), axis=1).reshape(len(counts), -1)


def predict_future_frames(recording: Recording, task: str, fold: int | None) -> np.ndarray:
    """Each ROI by ridge on its own past: how far the frames to come are from the last one."""
    problem = windows.problem(recording, task, fold)
    seen, change = scaled_frames(recording, problem, fold)
    rois = range(recording.traces.shape[1])
    own = [ridge({s: a[..., i] for s, a in seen.items()}, {s: a[..., i] for s, a in change.items()}) for i in rois]
    return unscaled_frames(recording, problem, fold, np.stack(own, -1))


def scaled_frames(recording: Recording, problem: Problem, fold: int | None) -> tuple[Arrays, Arrays]:
    """What is seen, and the change that is asked, in units of train's mean and sd."""
    mean, sd = protocol.train_moments(recording, fold)
    seen = {split: ((array - mean) / sd).astype(np.float32) for split, array in problem.seen.items()}
    last = {split: array[:, -1:] for split, array in problem.seen.items()}
    change = {split: ((array - last[split]) / sd).astype(np.float32) for split, array in problem.asked.items()}
    return seen, change


def unscaled_frames(recording: Recording, problem: Problem, fold: int | None, change: np.ndarray) -> np.ndarray:
    """Frames of test from scaled changes."""
    return problem.seen["test"][:, -1:] + change * protocol.train_moments(recording, fold)[1]


REGRESSIONS: dict[str, dict[str, Callable[[Recording, str, int | None], np.ndarray]]] = {
    "ridge": {"hd_acausal": predict_heading, "hd_causal": predict_heading, "forecast_ca": predict_future_frames},
    "GLM": {"cosmooth": predict_spikes, "forecast": predict_future_spikes},
}
