"""The small networks: an MLP for headings, co-smoothing and forecasts of spikes, a GRU for forecasts.

In: a Recording, a task, a fold. Out: predictions of the test block, of one network or the mean of three, from fixed
seeds; each keeps the pass over train with the least cost on the valid block, which also chose the recipes below.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from bench.science import protocol, windows
from bench.science.recordings import Recording
from bench.science.regressions import BINS_OF_A_BAND, LOWEST, poisson_cost, scaled_frames, unscaled_frames
from bench.science.windows import Arrays
from torch import nn

NUM_SEEDS = 3
WARM_UP = 0.1  # of the steps
Cost = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is made and trained; `features` reshape what is seen."""

    features: Callable[[np.ndarray], np.ndarray] = windows.root
    bin_s: float = protocol.BIN_S
    width: int = 256
    dropout: float = 0.3
    input_dropout: float = 0.3
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    passes: int = 10
    batch_size: int = 256
    stride: int = 1  # of the windows of train and valid; neighbours are alike


HEADING = {
    "hd_acausal": Recipe(bin_s=0.1),
    "hd_causal": Recipe(features=windows.recent, input_dropout=0.2),
}
SPIKES = Recipe(features=windows.around, dropout=0.5, input_dropout=0.2, learning_rate=1e-3)
FUTURE_BY_MLP = Recipe(features=windows.recent, dropout=0.5, learning_rate=1e-3, batch_size=128)
FUTURE_BY_GRU = Recipe(features=windows.binned(3), width=64, input_dropout=0.2, learning_rate=3e-3, batch_size=128)
FRAMES = Recipe(width=32, dropout=0.0, input_dropout=0.0, learning_rate=3e-3, passes=3, stride=6)


class Mlp(nn.Sequential):
    """Two hidden layers on all lags of all sources."""

    def __init__(self, num_inputs: int, num_outputs: int, recipe: Recipe) -> None:
        width, drop = recipe.width, recipe.dropout
        layers = [nn.Dropout(recipe.input_dropout), nn.Flatten()]
        for fan_in in (num_inputs, width):
            layers += [nn.Linear(fan_in, width), nn.GELU(), nn.Dropout(drop)]
        super().__init__(*layers, nn.Linear(width, num_outputs))


class Gru(nn.Module):
    """One layer over the lags; its last state says all."""

    def __init__(self, num_sources: int, num_outputs: int, recipe: Recipe) -> None:
        super().__init__()
        self.drop_input, self.drop = nn.Dropout(recipe.input_dropout), nn.Dropout(recipe.dropout)
        self.gru = nn.GRU(num_sources, recipe.width, batch_first=True)
        self.readout = nn.Linear(recipe.width, num_outputs)
        with torch.no_grad():
            self.readout.weight.mul_(0.1)

    def forward(self, seen: torch.Tensor) -> torch.Tensor:
        states, _ = self.gru(self.drop_input(seen))
        return self.readout(self.drop(states[:, -1]))


def fit(network: nn.Module, cost: Cost, inputs: Arrays, targets: Arrays, recipe: Recipe) -> float:
    """Train; leaves the weights of the pass with the least cost on valid, and returns that cost."""
    (seen, asked), valid = (_pair(inputs, targets, split, recipe.stride) for split in ("train", "valid"))
    steps_per_pass = math.ceil(len(seen) / recipe.batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.passes * steps_per_pass, pct_start=WARM_UP
    )
    best, kept = math.inf, network.state_dict()
    for _ in range(recipe.passes):
        network.train()
        for index in torch.randperm(len(seen)).split(recipe.batch_size):
            optimizer.zero_grad()
            cost(network(seen[index]), asked[index]).backward()
            optimizer.step()
            schedule.step()
        found = cost(say(network, valid[0]), valid[1]).item()
        if found < best:
            best, kept = found, copy.deepcopy(network.state_dict())
    network.load_state_dict(kept)
    return best


def _pair(inputs: Arrays, targets: Arrays, split: str, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(inputs[split][::stride]), torch.from_numpy(targets[split][::stride])


def say(network: nn.Module, seen: torch.Tensor) -> torch.Tensor:
    """Outputs without dropout."""
    network.eval()
    with torch.no_grad():
        return network(seen)


def mean_of(
    num_seeds: int, recipe: Recipe, inputs: Arrays, targets: Arrays, make: Callable[..., nn.Module], cost: Cost
) -> np.ndarray:
    """What networks from different seeds say of test, on average."""
    flat = {split: array.reshape(len(array), -1) for split, array in targets.items()}
    num_inputs = math.prod(inputs["test"].shape[1:]) if make is Mlp else inputs["test"].shape[2]
    said = []
    for seed in range(num_seeds):
        torch.manual_seed(seed)
        network = make(num_inputs, flat["train"].shape[1], recipe)
        if cost is poisson_cost:
            _begin_at_mean(network, flat["train"])
        fit(network, cost, inputs, flat, recipe)
        said.append(say(network, torch.from_numpy(inputs["test"])).numpy().astype(np.float64))
    return np.mean(said, 0).reshape(-1, *targets["train"].shape[1:])


def _begin_at_mean(network: nn.Module, counts: np.ndarray) -> None:
    readout = network[-1] if isinstance(network, nn.Sequential) else network.readout
    with torch.no_grad():
        readout.bias.copy_(torch.from_numpy(counts.mean(0)).clamp_min(1e-6).log())


# ---------------------------------------------------------------- the tasks


def predict_heading(recording: Recording, task: str, fold: int | None, num_seeds: int) -> np.ndarray:
    """cos and sin by MLP."""
    recipe = HEADING[task]
    problem = windows.problem(recording, task, fold, recipe.bin_s)
    return mean_of(num_seeds, recipe, problem.inputs(recipe.features), problem.asked, Mlp, nn.functional.mse_loss)


def predict_spikes(recording: Recording, task: str, fold: int | None, num_seeds: int) -> np.ndarray:
    """Held-out units by MLP."""
    problem = windows.problem(recording, task, fold)
    log_rate = mean_of(num_seeds, SPIKES, problem.inputs(SPIKES.features), problem.asked, Mlp, poisson_cost)
    return _floored(log_rate, problem.asked["train"])


def predict_future_spikes(
    recording: Recording,
    task: str,
    fold: int | None,
    num_seeds: int,
    recipe: Recipe = FUTURE_BY_GRU,
    make: Callable[..., nn.Module] = Gru,
) -> np.ndarray:
    """All units, one rate per band of 100 ms."""
    problem = windows.problem(recording, task, fold)
    bands = {
        split: asked.reshape(len(asked), -1, BINS_OF_A_BAND, recording.num_units).mean(2)
        for split, asked in problem.asked.items()
    }
    log_rate = mean_of(num_seeds, recipe, problem.inputs(recipe.features), bands, make, poisson_cost)
    return np.repeat(_floored(log_rate, bands["train"]), BINS_OF_A_BAND, axis=1)


def _floored(log_rate: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.maximum(np.exp(log_rate), LOWEST * counts.mean(0))


def predict_future_frames(recording: Recording, task: str, fold: int | None, num_seeds: int) -> np.ndarray:
    """Each ROI from its own past by one GRU for all."""
    problem = windows.problem(recording, task, fold)
    seen, change = scaled_frames(recording, problem, fold)

    def own(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array.transpose(2, 0, 1)).reshape(-1, array.shape[1])

    seen = {split: own(array)[..., None] for split, array in seen.items()}
    change = {split: own(array) for split, array in change.items()}
    found = mean_of(num_seeds, FRAMES, seen, change, Gru, nn.functional.mse_loss)
    found = found.reshape(recording.traces.shape[1], -1, protocol.NUM_FRAMES).transpose(1, 2, 0)
    return unscaled_frames(recording, problem, fold, found)


Predict = Callable[[Recording, str, int | None], np.ndarray]


def _of(num_seeds: int, **tasks: Callable[..., np.ndarray]) -> dict[str, Predict]:
    return {task: partial(predict, num_seeds=num_seeds) for task, predict in tasks.items()}


NETWORKS: dict[str, dict[str, Predict]] = {}
for number, ending in ((1, ""), (NUM_SEEDS, f", mean of {NUM_SEEDS}")):
    NETWORKS[f"MLP{ending}"] = _of(
        number,
        hd_acausal=predict_heading,
        hd_causal=predict_heading,
        cosmooth=predict_spikes,
        forecast=partial(predict_future_spikes, recipe=FUTURE_BY_MLP, make=Mlp),
    )
    NETWORKS[f"GRU{ending}"] = _of(
        number,
        forecast=partial(predict_future_spikes, recipe=FUTURE_BY_GRU, make=Gru),
        forecast_ca=predict_future_frames,
    )
