"""Windows changed on purpose: values replaced or shifted, sources in another order, twice as much of everything.

In: a window, and which of its samples are meant. Out: a window of which only that has changed.

Shape suffixes: n tokens, P samples per token, F frames.
"""

from dataclasses import fields, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from train.dataset import Sources, Window
from train.masking import Mask, TokenTable

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]
Predictions = list[npt.NDArray[np.float32]]
Replacement = Literal["noise", "NaN", "other"]


def spoil(
    window: Window, hidden: tuple[Bools, Bools], how: Replacement, other: Window, chance: np.random.Generator
) -> Window:
    """The window with samples (n, P) and frames (F,) replaced; what was missing is there now."""
    shape, frames = window.values.shape, window.pixels.shape
    values: Array = chance.normal(0, 3, shape)
    labels: Array = chance.poisson(3, shape).astype(np.float32)
    pixels: Array = chance.normal(0, 3, frames)
    times: Array = chance.uniform(0, 1, frames[:1])
    observed: Array = np.ones(shape, np.bool_)
    if how == "NaN":
        values, labels, pixels, times = (np.full(array.shape, np.nan) for array in (values, labels, pixels, times))
    if how == "other":
        names = ("values", "labels", "observed", "pixels", "frame_time_s")
        sizes = (shape, shape, shape, frames, frames[:1])
        values, labels, observed, pixels, times = (
            np.roll(np.resize(getattr(other, name), size), 1, axis=0) for name, size in zip(names, sizes, strict=True)
        )
    samples, shots = hidden
    return replace(
        window,
        values=np.where(samples, values, window.values).astype(np.float32),
        labels=np.where(samples, labels, window.labels).astype(np.float32),
        observed=np.where(samples, observed, window.observed),
        pixels=np.where(shots[:, None, None], pixels, window.pixels).astype(np.float32),
        frame_time_s=np.where(shots, times, window.frame_time_s).astype(np.float32),
    )


def shift(window: Window, samples: Bools, shots: Bools) -> Window:
    """The window with what is in `samples` (n, P) and `shots` (F,) moved on among themselves."""

    def moved(array: Array, chosen: Bools) -> Array:
        result, part = array.copy(), array[chosen]
        result[chosen] = np.roll(part, max(1, len(part) // 2), axis=0)
        return result

    return replace(
        window,
        values=moved(window.values, samples),
        labels=moved(window.labels, samples),
        observed=moved(window.observed, samples),
        pixels=moved(window.pixels, shots),
    )


def difference(before: Predictions, after: Predictions) -> float:
    """The largest difference; infinite where one is not finite or has another shape."""
    largest = 0.0
    for one, two in zip(before, after, strict=True):
        if one.shape != two.shape:
            return float("inf")
        apart = np.abs(one.astype(np.float64) - two)
        largest = max(largest, float(np.where(np.isnan(apart), np.inf, apart).max(initial=0)))
    return largest


def shuffle(window: Window, mask: Mask, chance: np.random.Generator) -> tuple[Window, Mask, Array]:
    """Sources (with their rows), tokens and frames in another order; token j was token order[j]."""
    place, order = chance.permutation(len(window.sources.row)), chance.permutation(len(window.values))
    frames = chance.permutation(len(window.pixels))
    tokens = TokenTable(*(getattr(window.tokens, field.name)[order] for field in fields(TokenTable)))
    names = ("token_ns", "sample_s", "values", "labels", "observed")
    columns: dict[str, Any] = {name: getattr(window, name)[order] for name in names}
    shuffled = replace(
        window,
        sources=Sources(*(getattr(window.sources, field.name)[place] for field in fields(Sources))),
        tokens=replace(tokens, source=np.argsort(place)[tokens.source]),
        pixels=window.pixels[frames],
        frame_time_s=window.frame_time_s[frames],
        **columns,
    )
    folds = None if mask.folds is None else mask.folds[order]
    return shuffled, Mask(mask.visible[order], mask.asked[order], mask.frames, folds), order


def companion(window: Window) -> tuple[Window, Mask]:
    """Twice the window, all of it visible and asked: in its company every other window of the batch is padded."""

    def twice(thing: Any) -> Any:
        return type(thing)(*(np.concatenate([getattr(thing, f.name)] * 2) for f in fields(thing)))

    names = ("token_ns", "sample_s", "values", "labels", "observed", "pixels", "frame_time_s")
    arrays: dict[str, Any] = {name: np.concatenate([getattr(window, name)] * 2) for name in names}
    large = replace(window, sources=twice(window.sources), tokens=twice(window.tokens), **arrays)
    everything = np.ones(len(large.values), np.bool_)
    return large, Mask(everything, everything, frames=True)


def unshuffle(predictions: npt.NDArray[np.float32], mask: Mask, order: Array) -> npt.NDArray[np.float32]:
    """Predictions of shuffled tokens (n asked, P) in the order in which the asked tokens were before."""
    before: npt.NDArray[np.float32] = predictions[np.argsort(order[mask.asked])]
    return before
