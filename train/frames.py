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
STILL_NS = 100_000_000  # what is replaced so soon after a window's start is not shown: a film's last frame
HELD_NS = 10_000_000_000  # longest that a frame is taken to stay
OLDEST_S = 1.0  # what is on for longer is as if it had come then


class FrameReader:
    """Reads the frames of windows; at most `max_frames` of each window, spread evenly."""

    def __init__(self, store: Store, image_size: tuple[int, int], max_frames: int) -> None:
        self.store, self.image_size, self.max_frames = store, image_size, max_frames
        self._frame = functools.lru_cache(max(1, KEPT_BYTES // (4 * image_size[0] * image_size[1])))(self._read_frame)

    def none(self) -> tuple[Array, Array]:
        """Pixels and times of a window that shows nothing."""
        return np.zeros((0, *self.image_size), np.float32), np.zeros(0, np.float32)

    def read(self, session: Session, start_ns: int, stop_ns: int) -> tuple[Array, Array]:
        """Pixels (F, H, W), standardised, and times in seconds from `start_ns` (F,).

        A frame that was on the screen before has a negative time; where one goes and none comes, there is a grey one.
        """
        time_ns, frames = [np.zeros(0, np.int64)], []
        for description in session.entry["streams"]:
            if description["kind"] != "frames":
                continue
            stream = session.stream(description["name"])
            inside = stream.tokens(start_ns, stop_ns)
            tokens = slice(max(0, inside.start - 1), inside.stop)  # and the one before
            indices, begun_ns = stream.read(tokens)[:, 0, 0], stream.start_ns[tokens]
            is_shown = indices >= 0
            keep = is_shown | np.append(False, is_shown[:-1])[: len(is_shown)]
            if tokens != inside:
                keep[0] = is_shown[0] and is_on(stream.start_ns, inside.start, start_ns)
            time_ns.append(begun_ns[keep])
            frames += [(description["stimulus"], index) for index in indices[keep].tolist()]
        if not frames:
            return self.none()
        begun_ns = np.concatenate(time_ns)
        num_chosen = min(len(frames), self.max_frames)
        places = np.unique(np.linspace(0, len(frames) - 1, num_chosen).astype(int))
        chosen = begun_ns.argsort(kind="stable")[places]
        time_s = np.maximum((begun_ns[chosen] - start_ns) / 1e9, -OLDEST_S).astype(np.float32)
        return np.stack([self._frame(*frames[place]) for place in chosen]), time_s

    def _read_frame(self, stimulus: str, index: int) -> npt.NDArray[np.float32]:
        if index < 0:
            return np.zeros(self.image_size, np.float32)
        frame: npt.NDArray[np.float32] = resize_frames(
            self.store.frames(stimulus).read(index, index + 1), self.image_size
        )[0]
        return frame


def is_on(begun_ns: npt.NDArray[np.int64], first: int, start_ns: int) -> bool:
    """Is the frame before the first of a window still on the screen when the window starts?

    A frame stays until the next token; what nothing follows, or only much later, is taken to have gone.
    """
    if first == len(begun_ns):
        return False
    before_ns, after_ns = begun_ns[first - 1 : first + 1].tolist()
    return bool(after_ns - start_ns > STILL_NS and after_ns - before_ns <= HELD_NS)


def resize_frames(frames: Array, size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Frames (F, h, w[, C]) uint8 to grey, standardised (F, H, W) float32; a change of size averages areas."""
    grey = frames.astype(np.float32)
    grey = grey.mean(-1) if grey.ndim == 4 else grey
    if grey.shape[1:] != tuple(size):
        resized = torch.nn.functional.interpolate(torch.from_numpy(grey)[:, None], list(size), mode="area")
        grey = resized[:, 0].numpy()
    return standard_pixels(grey)
