"""Identities from a support segment: what units do while stimulus and behaviour are known tells who they are.

In: a trained model whose weights stay as they are, a session with units that it has never seen, the rows it knows.
Out: the most probable row of each new unit, given its activity and the prior of known rows (empirical Bayes: the mean
and covariance of the rows of the same modality; Robbins 1956).

The features that every source reads do not depend on the units that are hidden, so that they are computed once, and
what is left is one small regression per unit, on the model's own likelihood. Nothing of the model is trained. First
from stimulus and behaviour; then, with these rows, from the other units as well, each fold from the others; and again,
with rows by which the others are better read.

Shapes: U new units, F measured features of each, E unit_embed_size, B windows of a batch, G times of the readout grid,
D hidden_size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prep.settings import ACTIVITY, MODALITIES
from train.dataset import Window
from train.evaluate import spread
from train.masking import Mask, draw_mask, encoding
from train.trained import Known, Trained

BATCH = 16
MAX_WINDOWS = 400  # of one session: enough, and minutes rather than hours
MAX_ITERATIONS = (60, 30, 30)  # from what is known, then twice from each other as well: as the rows before tell of them
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
    """Some windows of the support: what is read, and what U new units of one modality did."""

    features_BGD: Tensor
    unit_features_BUF: Tensor
    asked: dict[str, Any]  # what `answer` takes beside features and identities


def infer_rows(trained: Trained, session: int, known: Known, say: Callable[[str], None]) -> int:
    """Set the rows of a session's unknown units in the table; returns the number of support windows."""
    sources = trained.reader.sources(session)
    new = np.flatnonzero(known.unknown[sources.row] & (sources.modality < NUM_ACTIVITY))
    starts = spread(trained, "train", session, MAX_WINDOWS)
    if not len(new) or not starts:
        if len(new):
            say(
                f"no window in its train split: {len(new)} new units have measured features only. Give it a part of it."
            )
        return 0
    from_known: dict[int, list[Segment]] = {}
    for turn, iterations in enumerate(MAX_ITERATIONS):
        masks, what = (others_mask, "each other as well") if turn else (support_mask, "what is known")
        for modality in np.unique(sources.modality[new]):
            own = new[sources.modality[new] == modality]
            rows = torch.from_numpy(sources.row[own])
            prior = Prior.of(known.rows[known.modality == int(modality)])
            say(f"{len(own)} {MODALITIES[modality]} units from {what}, {len(starts)} windows")
            segments = [*from_known.get(modality, []), *read_segments(trained, session, starts, own, masks)]
            from_known.setdefault(modality, segments)  # kept as the first turn read them
            start = trained.table.weight[rows] if turn else prior.mean_E.expand(len(own), -1)
            trained.table.weight[rows] = most_probable(trained, segments, start, prior, iterations)
    return len(starts)


@torch.no_grad()
def read_segments(
    trained: Trained,
    session: int,
    starts: list[int],
    units: npt.NDArray[np.int64],
    masked: Callable[[Window, npt.NDArray[np.int64]], Mask],
) -> Iterator[Segment]:
    """Features of the support windows under a mask, and what the units did."""
    place = torch.full((len(trained.reader.sources(session).row),), -1, dtype=torch.int64)
    place[units] = torch.arange(len(units))
    chosen = torch.from_numpy(units)
    for first in range(0, len(starts), BATCH):
        context_ns = round(trained.run.data.context_s * 1e9)
        windows = [trained.reader.read(session, start, context_ns) for start in starts[first : first + BATCH]]
        batch = trained.batch(windows, [masked(window, units) for window in windows])
        output = trained.model(**batch)
        others = {}
        if output.left_out is not None:
            others = {"left_out": output.left_out, "source_fold": batch["source_fold"][:, chosen]}
        yield Segment(
            output.features,
            batch["unit_features"][:, chosen],
            {
                "source_modality": batch["source_modality"][:, chosen],
                "source_null": batch["source_null"][:, chosen],
                "query_source": place[batch["query_source"]].clamp(min=0),  # padding asks for nothing
                **{name: batch[name] for name in ("query_time_s", "query_sample_s", "labels", "label_mask")},
                **others,
            },
        )


def support_mask(window: Window, units: npt.NDArray[np.int64]) -> Mask:
    """The new units are asked; no activity is seen, all else is."""
    mask = encoding(window.tokens, behavior=True, stimulus=True)
    return replace(mask, asked=mask.asked & np.isin(window.tokens.source, units))


def others_mask(window: Window, units: npt.NDArray[np.int64]) -> Mask:
    """The new units are asked, each from the units of other folds, new ones or not; nothing else is seen."""
    mask = draw_mask("leave_out", window.tokens, 0.0, np.random.default_rng(window.start_ns % 2**63))
    return replace(mask, asked=mask.asked & np.isin(window.tokens.source, units))


def most_probable(trained: Trained, segments: list[Segment], start_UE: Tensor, prior: Prior, iterations: int) -> Tensor:
    """Rows (U, E) of the units with the least -log posterior, by L-BFGS (Liu & Nocedal 1989) from `start_UE` on."""
    rows = start_UE.detach().clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [rows], max_iter=iterations, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-6
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = prior.nats(rows)
        total.backward()
        for segment in segments:
            part = segment_nats(trained, segment, rows)
            part.backward()
            total = total.detach() + part.detach()
        return total

    optimizer.step(closure)
    return rows.detach()


def segment_nats(trained: Trained, segment: Segment, rows_UE: Tensor) -> Tensor:
    """NLL - NLL_null of the units' samples in the segment, summed: without weights and tempering."""
    rows_BUE = rows_UE.expand(len(segment.features_BGD), -1, -1)
    model = trained.model
    identity = model.model.identity(rows_BUE, segment.unit_features_BUF, segment.asked["source_modality"])
    nats = model.answer(segment.features_BGD, identity, **segment.asked).nats
    assert nats is not None
    return nats.sum()
