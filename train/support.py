"""Identities from a support segment: what units do while stimulus and behaviour are known tells who they are.

In: a trained model whose weights stay as they are, a session with units that it has never seen, the rows it knows.
Out: the most probable row of each new unit, given its activity and the prior of known rows (empirical Bayes: the mean
and covariance of the rows of the same modality; Robbins 1956).

The features that every source reads do not depend on the units that are hidden, so that they are computed once, and
what is left is one small regression per unit, on the model's own likelihood. Nothing of the model is trained.

Shapes: U new units, E unit_embed_size, B windows of a batch, G times of the readout grid, D hidden_size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prep.settings import ACTIVITY, MODALITIES
from train.config import DataConfig
from train.dataset import Window, budget, collate, make_sample
from train.evaluate import spread
from train.masking import Mask, encoding, is_activity
from train.trained import Known, Trained

BATCH = 16
MAX_WINDOWS = 400  # of one session: enough, and minutes rather than hours
MAX_ITERATIONS = 60
SHRINKAGE = 0.1  # of the covariance towards a sphere (Ledoit & Wolf 2004): there may be fewer rows than dimensions
NUM_ACTIVITY = len(ACTIVITY)


@dataclass(frozen=True)
class Prior:
    """A normal distribution of rows."""

    mean_E: Tensor
    precision_EE: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> "Prior":
        """Of known rows (R, E); of a standard normal where there are fewer than two, as rows start."""
        size = rows.shape[1]
        if len(rows) < 2:
            return cls(torch.zeros(size), torch.eye(size))
        covariance = torch.cov(rows.T)
        sphere = covariance.diagonal().mean() * torch.eye(size)
        return cls(rows.mean(0), torch.linalg.inv((1 - SHRINKAGE) * covariance + SHRINKAGE * sphere))

    def nats(self, rows_UE: Tensor) -> Tensor:
        """-log density of rows, summed, up to a constant."""
        away = rows_UE - self.mean_E
        return 0.5 * torch.einsum("ue,ef,uf->", away, self.precision_EE, away)


@dataclass(frozen=True)
class Segment:
    """Windows of the support: features that are read, and what the units did."""

    features_BGD: Tensor
    batch: dict[str, Tensor]  # all windows hold all sources of the session, in the same order


def infer_rows(trained: Trained, session: int, known: Known, say: Callable[[str], None]) -> int:
    """Set the rows of a session's unknown units in the table; returns the number of support windows."""
    sources = trained.reader.sources(session)
    new = np.flatnonzero(known.unknown[sources.row] & (sources.modality < NUM_ACTIVITY))
    starts = spread(trained, "train", session, MAX_WINDOWS)
    if not len(new) or not starts:
        return 0
    segments = list(read_segments(trained, session, starts))
    for modality in np.unique(sources.modality[new]):
        own = new[sources.modality[new] == modality]
        rows = torch.from_numpy(sources.row[own])
        prior = Prior.of(known.rows[known.modality == int(modality)])
        say(f"{len(own)} {MODALITIES[modality]} units from {len(starts)} windows")
        trained.table.weight[rows] = most_probable(trained, segments, own, prior)
    return len(starts)


@torch.no_grad()
def read_segments(trained: Trained, session: int, starts: list[int]) -> Iterator[Segment]:
    """Features of the support windows, from stimulus and behaviour alone."""
    context_s = trained.run.data.context_s
    shape = budget(trained.store, support_data(trained, session), "encoding")
    for first in range(0, len(starts), BATCH):
        samples = []
        for start in starts[first : first + BATCH]:
            window = trained.reader.read(session, start, round(context_s * 1e9))
            samples.append(make_sample(window, support_mask(window), shape))
        batch = collate(samples)
        embeds = trained.table.lookup(batch.pop("unit_rows")).detach()
        trained.table.discard()
        features = trained.model(unit_embeds=embeds, **batch).features
        yield Segment(features.clone(), batch)


def support_data(trained: Trained, session: int) -> DataConfig:
    """Every unit of the session, every token."""
    return replace(trained.run.data, max_units=int(trained.store.entries[session]["num_units"]), max_queries=1 << 30)


def support_mask(window: Window) -> Mask:
    """All activity is asked; all else is seen."""
    mask = encoding(window.tokens, behavior=True, stimulus=True)
    assert not (mask.visible & is_activity(window.tokens)).any()
    return mask


def most_probable(trained: Trained, segments: list[Segment], units: npt.NDArray[np.int64], prior: Prior) -> Tensor:
    """Rows (U, E) of the units with the least -log posterior, by L-BFGS (Liu & Nocedal 1989) from the prior's mean."""
    place = torch.from_numpy(units)
    rows = prior.mean_E.expand(len(units), -1).clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [rows], max_iter=MAX_ITERATIONS, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-6
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = prior.nats(rows)
        total.backward()
        for segment in segments:
            part = segment_nats(trained, segment, place, rows)
            part.backward()
            total = total.detach() + part.detach()
        return total

    optimizer.step(closure)
    return rows.detach()


def segment_nats(trained: Trained, segment: Segment, place_U: Tensor, rows_UE: Tensor) -> Tensor:
    """NLL - NLL_null of the units' samples in the segment, summed: without weights and tempering."""
    batch, model = segment.batch, trained.model
    num = len(segment.features_BGD)
    modality = batch["source_modality"][:, place_U]
    identity = model.model.identity(rows_UE.expand(num, -1, -1), batch["unit_features"][:, place_U], modality)
    where = torch.full((batch["source_modality"].shape[1],), -1, dtype=torch.int64)
    where[place_U] = torch.arange(len(place_U))
    source = where[batch["query_source"]]
    answered = model.answer(
        segment.features_BGD,
        identity,
        modality,
        batch["source_null"][:, place_U],
        source.clamp(min=0),
        batch["query_time_s"],
        batch["query_sample_s"],
        batch["labels"],
        batch["label_mask"] & (source >= 0)[..., None],
    )
    assert answered.nats is not None
    return answered.nats.sum()
