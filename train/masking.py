"""Tasks as masks: which tokens of a window are visible, and which are asked for.

In: the tokens of one window (modality, source, time), a task family, its own chance. Out: boolean arrays, and folds.
Co-smoothing and forecasting see activity alone; decoding too; encoding sees stimulus and behaviour. Leave-out asks for
all units, each from those of other folds: co-smoothing in which nothing is wasted. Events are seen with what they are
part of, of the store's modalities: licks with behaviour, onsets of stimuli with the stimulus.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from prep.settings import ACTIVITY
from train.config import Family
from train.modalities import MODALITIES, Modality
from train.model.decoder_brainloom import NUM_FOLDS

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

SPIKES, TRACES, BEHAVIOR, STIMULUS, EVENTS = (
    MODALITIES.index(name) for name in ("spikes", "traces", "behavior", "stimulus", "events")
)
HIDDEN_UNITS = (0.1, 0.5)  # share of units hidden in co-smoothing
FORECAST_FROM = (0.4, 0.8)  # the cut, as a share of the window
INPAINT_SHARE = 0.3
INPAINT_BLOCK_S = 0.3
_IS_ACTIVITY = np.array([name in ACTIVITY for name in MODALITIES])
STIMULUS_DROP = 0.3  # how often encoding is trained on behaviour alone


@dataclass(frozen=True)
class TokenTable:
    """The tokens of one window, n in all; stimulus frames are apart, they are never asked for."""

    modality: npt.NDArray[np.int64]  # (n,) index into MODALITIES
    source: npt.NDArray[np.int64]  # (n,)
    start_s: npt.NDArray[np.float64]  # (n,) from the window's start
    stop_s: npt.NDArray[np.float64]  # (n,)
    of_stimulus: Bools = field(default_factory=lambda: np.zeros(1, np.bool_))  # (n,) is it of events of the stimulus


@dataclass(frozen=True)
class Mask:
    """What is visible and what is asked; tokens in neither are not used."""

    visible: Bools  # (n,)
    asked: Bools  # (n,)
    frames: bool  # is the stimulus visible
    folds: Ints | None = None  # (n,) fold of each token whose unit is read from the other folds; -1 of other tokens


@dataclass(frozen=True)
class Task:
    """What is asked of the model in evaluation: (asked modality, family, visible modalities)."""

    modality: Modality
    family: Family
    visible: tuple[Modality, ...]


TASKS = (
    Task("spikes", "encoding", ("behavior", "stimulus")),
    Task("spikes", "encoding", ("behavior",)),
    Task("spikes", "encoding", ("stimulus",)),
    Task("spikes", "co_smoothing", ("spikes",)),
    Task("spikes", "forecasting", ("spikes",)),
    Task("traces", "encoding", ("behavior", "stimulus")),
    Task("traces", "encoding", ("behavior",)),
    Task("traces", "encoding", ("stimulus",)),
    Task("traces", "co_smoothing", ("traces",)),
    Task("traces", "forecasting", ("traces",)),
    Task("behavior", "decoding", ("spikes",)),
    Task("behavior", "decoding", ("traces",)),
    Task("events", "decoding", ("spikes",)),
    Task("events", "decoding", ("traces",)),
)


def draw_mask(mix: str, tokens: TokenTable, context_s: float, chance: np.random.Generator) -> Mask:
    """The mask of one training sample, of one family or of a mix (`co_smoothing+decoding`).

    A mix asks for what any of its families asks for, and shows what all of them show; what has a fold keeps it.
    """
    masks = [_draw_one(family, tokens, context_s, chance) for family in mix.split("+")]
    visible = np.logical_and.reduce([mask.visible for mask in masks])
    asked = np.logical_or.reduce([mask.asked for mask in masks])
    folds = next((mask.folds for mask in masks if mask.folds is not None), None)
    return Mask(visible, asked, all(mask.frames for mask in masks), folds)


def num_folds(mix: str) -> int:
    """Into how many folds units are dealt in a mix of families."""
    return NUM_FOLDS if "leave_out" in mix.split("+") else 0


def _draw_one(family: str, tokens: TokenTable, context_s: float, chance: np.random.Generator) -> Mask:
    activity = is_activity(tokens)
    if family == "co_smoothing":
        units = np.flatnonzero(np.bincount(tokens.source[activity]))
        share = chance.uniform(*HIDDEN_UNITS)
        hidden = chance.permutation(units)[: max(1, round(share * len(units)))]
        return co_smoothing(tokens, hidden)
    if family == "leave_out":
        units = np.flatnonzero(np.bincount(tokens.source[activity]))
        fold = np.full(tokens.source.max(initial=-1) + 1, -1)
        fold[units] = chance.permutation(len(units)) % NUM_FOLDS
        return Mask(activity, activity, frames=False, folds=np.where(activity, fold[tokens.source], -1))
    if family == "forecasting":
        possible_s = cuts(tokens.stop_s[activity], context_s)
        drawn_s = chance.choice(possible_s) if len(possible_s) else context_s * chance.uniform(*FORECAST_FROM)
        return forecasting(tokens, float(drawn_s))
    if family == "encoding":
        return encoding(tokens, behavior=True, stimulus=bool(chance.random() >= STIMULUS_DROP))
    if family == "decoding":
        return decoding(tokens)
    asked = inpainting_blocks(tokens, context_s, chance)
    return Mask(~asked, asked, frames=True)


def cuts(stop_s: npt.NDArray[np.float64], context_s: float) -> npt.NDArray[np.float64]:
    """Where a forecast may begin in training: where a token ends.

    A token across the cut would be neither seen nor asked for, and what comes next would never be learned.
    """
    earliest_s, latest_s = (share * context_s for share in FORECAST_FROM)
    inside = (stop_s >= earliest_s - 1e-9) & (stop_s <= latest_s + 1e-9)
    borders_s: npt.NDArray[np.float64] = np.unique(stop_s[inside].round(9))
    return borders_s


def is_activity(tokens: TokenTable) -> Bools:
    """Tokens of units (n,)."""
    activity: Bools = _IS_ACTIVITY[tokens.modality]
    return activity


def co_smoothing(tokens: TokenTable, hidden_sources: npt.NDArray[np.int64]) -> Mask:
    """Hide whole units; the other units' activity alone is visible."""
    is_hidden = np.zeros(tokens.source.max(initial=-1) + 1, np.bool_)
    is_hidden[hidden_sources] = True
    hidden = is_hidden[tokens.source] & is_activity(tokens)
    return Mask(is_activity(tokens) & ~hidden, hidden, frames=False)


def forecasting(tokens: TokenTable, cut_s: float) -> Mask:
    """Hide activity from the cut on; a token that crosses it is neither visible nor asked."""
    activity = is_activity(tokens)
    return Mask(activity & (tokens.stop_s <= cut_s + 1e-9), activity & (tokens.start_s >= cut_s - 1e-9), frames=False)


def encoding(tokens: TokenTable, *, behavior: bool, stimulus: bool) -> Mask:
    """Hide all activity."""
    seen = seen_with(tokens)
    visible = ((seen == BEHAVIOR) & behavior) | ((seen == STIMULUS) & stimulus)
    return Mask(visible, is_activity(tokens), frames=stimulus)


def decoding(tokens: TokenTable) -> Mask:
    """Hide behaviour and events."""
    return Mask(is_activity(tokens), np.isin(tokens.modality, (BEHAVIOR, EVENTS)), frames=False)


def seen_with(tokens: TokenTable) -> npt.NDArray[np.int64]:
    """The modality (n,) with which each token is seen: that of the store, which has no events."""
    of_event = np.where(tokens.of_stimulus, STIMULUS, BEHAVIOR)
    return np.where(tokens.modality == EVENTS, of_event, tokens.modality)


def inpainting_blocks(tokens: TokenTable, context_s: float, chance: np.random.Generator) -> Bools:
    """Hide blocks of time, drawn for each source apart."""
    if not len(tokens.source):
        return np.zeros(0, np.bool_)
    num_blocks = max(1, round(context_s / INPAINT_BLOCK_S))
    hidden = chance.random((int(tokens.source.max()) + 1, num_blocks)) < INPAINT_SHARE
    block = np.clip((tokens.start_s / context_s * num_blocks).astype(np.int64), 0, num_blocks - 1)
    asked: Bools = hidden[tokens.source, block]
    return asked


def task_mask(task: Task, tokens: TokenTable, context_s: float) -> Mask:
    """The fixed mask of an evaluation task: every fifth unit in co-smoothing, the second half in forecasting."""
    if task.family == "co_smoothing":
        units = np.unique(tokens.source[is_activity(tokens)])
        mask = co_smoothing(tokens, units[::5])
    elif task.family == "forecasting":
        mask = forecasting(tokens, context_s / 2)
    elif task.family == "encoding":
        mask = encoding(tokens, behavior="behavior" in task.visible, stimulus="stimulus" in task.visible)
    else:
        mask = decoding(tokens)
    visible = np.isin(seen_with(tokens), [MODALITIES.index(name) for name in task.visible])
    return Mask(mask.visible & visible, mask.asked & (tokens.modality == MODALITIES.index(task.modality)), mask.frames)
