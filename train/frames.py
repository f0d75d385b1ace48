"""Stimulus frames of a window, at the size that the model sees; the last ones stay in memory, as films are seen often.

In: a store, a stretch of a session. Out: pixels and times.

Shape suffixes: F frames.
"""

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from prep.store import Session, Store
from train.model.processing_brainloom import standard_pixels

Array = npt.NDArray[Any]
KEPT_BYTES = 64 * 2**20  # of frames at the model's size


class FrameReader:
    """Reads the frames of windows; at most `max_frames` of each stimulus and window, spread evenly."""

    def __init__(self, store: Store, image_size: tuple[int, int], max_frames: int) -> None:
        self.store, self.image_size, self.max_frames = store, image_size, max_frames
        self._frame = functools.lru_cache(max(1, KEPT_BYTES // (4 * image_size[0] * image_size[1])))(self._read_frame)

    def none(self) -> tuple[Array, Array]:
        """Pixels and times of a window that shows nothing."""
        return np.zeros((0, *self.image_size), np.float32), np.zeros(0, np.float32)

    def read(self, session: Session, start_ns: int, stop_ns: int) -> tuple[Array, Array]:
        """Pixels (F, H, W), standardised, and times in seconds from `start_ns` (F,)."""
        pixels, times = [], []
        for description in session.entry["streams"]:
            if description["kind"] != "frames":
                continue
            stream = session.stream(description["name"])
            shown = stream.tokens(start_ns, stop_ns)
            indices = stream.read(shown)[:, 0, 0]
            keep = np.flatnonzero(indices >= 0)
            if len(keep):
                keep = keep[np.unique(np.linspace(0, len(keep) - 1, min(len(keep), self.max_frames)).astype(int))]
                pixels += [self._frame(description["stimulus"], index) for index in indices[keep].tolist()]
                times.append((stream.start_ns[shown][keep] - start_ns) / 1e9)
        if not pixels:
            return self.none()
        first = slice(0, self.max_frames)
        return np.stack(pixels[first]), np.concatenate(times)[first].astype(np.float32)

    def _read_frame(self, stimulus: str, index: int) -> npt.NDArray[np.float32]:
        frame: npt.NDArray[np.float32] = resize_frames(
            self.store.frames(stimulus).read(index, index + 1), self.image_size
        )[0]
        return frame


def resize_frames(frames: Array, size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Frames (F, h, w[, C]) uint8 to grey, standardised (F, H, W) float32; a change of size averages areas."""
    grey = frames.astype(np.float32)
    grey = grey.mean(-1) if grey.ndim == 4 else grey
    if grey.shape[1:] != tuple(size):
        resized = torch.nn.functional.interpolate(torch.from_numpy(grey)[:, None], list(size), mode="area")
        grey = resized[:, 0].numpy()
    return standard_pixels(grey)
