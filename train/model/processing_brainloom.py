"""From raw arrays and unit keys to the model's inputs, and from its predictions back to physical units.

In: streams of tokens as they were recorded, the keys of their sources, what is visible and what is asked.
Out: the keyword arguments of BrainloomForPreTraining. Needs nothing but the hub folder.

Shape suffixes: K token times, S sources, P samples per token, n tokens, F frames.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import FeatureExtractionMixin
from transformers.utils.hub import cached_file

from .configuration_brainloom import COUNTED, MODALITIES, PREDICTED
from .events_brainloom import NextEvent, intensities
from .likelihoods_brainloom import MIN_HEIGHT

Array = npt.NDArray[Any]
TRACES, EVENTS, SESSION = (MODALITIES.index(name) for name in ("traces", "events", "session"))
IS_COUNTED = np.array([name in COUNTED for name in MODALITIES])
STANDARD_LIMIT = 20.0  # standard deviations; what lies beyond is an artefact
EVENT_BINS = 5  # of 20 ms, in a token of events
PIXEL_MEAN, PIXEL_SCALE = 127.5, 64.0
UNITS_FILE, KEYS_FILE = "units.safetensors", "unit_keys.json"


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Tokens of sources that share a clock.

    Attributes:
        keys: the S sources: a unit's `unit_key`, a behaviour channel's `dataset/session/channel`, that of a type of
            events `dataset/session/stream/type`.
        modality: spikes, traces, behavior or events.
        values: as recorded (K, S, P): counts per 20 ms bin of spikes and events, or samples in their physical unit; NaN
            = missing.
        start_s: when each token starts (K,), seconds from the window's start.
        sample_s: seconds between two samples of a token.
        visible: which tokens the model may see (K, S), bool.
        asked: which tokens it shall predict (K, S), bool.
        offset_s: each source's own delay (S,), for instance its scan phase.
    """

    keys: list[str]
    modality: str
    values: Array
    start_s: Array
    sample_s: float
    visible: Array
    asked: Array
    offset_s: Array | None = None


class BrainloomProcessor(FeatureExtractionMixin):
    """Knows, for every source of the training data, its row, features, mean and scale."""

    model_input_names: ClassVar[list[str]] = ["input_values"]

    def __init__(self, samples_per_token: int = 16, image_size: tuple[int, int] = (24, 24), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.samples_per_token = samples_per_token
        self.image_size = list(image_size)
        self.unit_keys: list[str] = []
        self.units: dict[str, Tensor] = {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "BrainloomProcessor":  # type: ignore[override]  # the library's has more arguments
        """Load from a hub folder or repository, the unit table included."""
        processor: BrainloomProcessor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        source = str(pretrained_model_name_or_path)
        names = ("cache_dir", "revision", "token", "local_files_only", "subfolder")
        known = {name: kwargs[name] for name in names if name in kwargs}
        units, keys = (str(cached_file(source, name, **known)) for name in (UNITS_FILE, KEYS_FILE))
        return processor.with_units(json.loads(Path(keys).read_text()), load_file(units))

    def with_units(self, keys: list[str], units: dict[str, Tensor]) -> "BrainloomProcessor":
        """Set the table: `weight` (R, E), `features` (R, U), `mean`, `scale` and `modality` (R,)."""
        self.unit_keys, self.units = keys, units
        return self

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Write the configuration and the unit table, and push them; returns what was written."""
        written: list[str] = super().save_pretrained(str(save_directory))
        units, keys = (Path(save_directory) / name for name in (UNITS_FILE, KEYS_FILE))
        save_file(self.units, units)
        keys.write_text(json.dumps(self.unit_keys))
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return [*written, str(units), str(keys)]

    def to_dict(self) -> dict[str, Any]:
        """The configuration; the unit table has files of its own."""
        content: dict[str, Any] = super().to_dict()
        return {key: value for key, value in content.items() if key not in ("unit_keys", "units")}

    def rows(self, keys: list[str]) -> Tensor:
        """Rows of the table (S,); an unknown key is an error that names it."""
        place = {key: row for row, key in enumerate(self.unit_keys)}
        unknown = [key for key in keys if key not in place]
        if unknown:
            raise KeyError(
                f"{len(unknown)} of {len(keys)} sources are not in this model's unit table (first: {unknown[0]!r}). "
                f"It knows {len(place)}, for instance {self.unit_keys[:1]}."
            )
        return torch.tensor([place[key] for key in keys], dtype=torch.int64)

    def session_rows(self, keys: Sequence[str]) -> Tensor:
        """Rows of a session and its subject; what is not in the table as such has none: it is absent."""
        place = {key: row for row, key in enumerate(self.unit_keys)} if keys else {}
        rows = torch.tensor([place[key] for key in keys if key in place], dtype=torch.int64)
        return rows[self.units["modality"][rows] == SESSION]

    def __call__(
        self,
        streams: list[Stream],
        pixels: Array | None = None,
        frame_time_s: Array | None = None,
        session: Sequence[str] = (),
    ) -> dict[str, Tensor]:
        """Inputs of one window, batch size 1.

        Args:
            streams: what was recorded.
            pixels: stimulus that is visible (F, H, W), grey at the model's image size: uint8, or float standardised as
                `standard_pixels` does.
            frame_time_s: when each frame came on (F,); negative, at least -1, of one that was on the screen before.
                Where a frame goes and none comes, give a grey one.
            session: what the recording is of, as far as the model knows it: `dataset/session:…`, `dataset/subject:…`.
        """
        if not streams:
            raise ValueError("streams is empty. Give at least one Stream, of what is visible or asked.")
        rows = self.rows([key for stream in streams for key in stream.keys])
        first = np.cumsum([0, *(len(stream.keys) for stream in streams)])
        for stream, begin, end in zip(streams, first[:-1], first[1:], strict=True):
            self._check(stream, self.units["modality"][rows[begin:end]])
        parts = [self._tokens(stream, int(begin), rows) for stream, begin in zip(streams, first[:-1], strict=True)]
        token = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        visible, asked = np.flatnonzero(token["visible"]), np.flatnonzero(token["asked"])
        modality = torch.tensor([MODALITIES.index(s.modality) for s in streams for _ in s.keys])
        of_session = self.session_rows(session)
        rows, modality = torch.cat([rows, of_session]), torch.cat([modality, torch.full_like(of_session, SESSION)])
        mean = self.units["mean"][rows]
        shown = np.zeros((0, *self.image_size), np.float32) if pixels is None else pixels
        shown = standard_pixels(shown) if shown.dtype == np.uint8 else shown
        times = np.zeros(0) if frame_time_s is None else np.asarray(frame_time_s)
        if times.shape != shown.shape[:1] or shown.shape[1:] != tuple(self.image_size):
            raise ValueError(
                f"pixels are {shown.shape} and frame_time_s {times.shape}. Give pixels (F, H, W) with H, W = "
                f"{tuple(self.image_size)}, and a time for each of the F frames."
            )
        inputs = {
            "unit_embeds": self.units["weight"][rows],
            "unit_features": self.units["features"][rows],
            "source_modality": modality,
            "source_null": source_null(modality.numpy(), mean.numpy(), self.units["scale"][rows].numpy()),
            "input_values": token["standard"][visible],
            "input_observed": token["observed"][visible],
            "input_source": token["source"][visible],
            "input_time_s": token["middle_s"][visible],
            "input_start_s": token["start_s"][visible],
            "input_sample_s": token["sample_s"][visible],
            "input_mask": np.ones(len(visible), bool),
            "pixels": shown,
            "frame_time_s": times.astype(np.float32),
            "frame_mask": np.ones(len(shown), bool),
            "query_source": token["source"][asked],
            "query_time_s": token["start_s"][asked],
            "query_sample_s": token["sample_s"][asked],
            "labels": token["labels"][asked],
            "label_mask": token["observed"][asked],
        }
        return {name: torch.as_tensor(value)[None] for name, value in inputs.items()}

    def _check(self, stream: Stream, modality: Tensor) -> None:
        """Refuse what would be read as something else; `modality`: of its keys, in the unit table."""
        name = f"The stream of {stream.modality} that begins with {stream.keys[:1]}"
        if stream.modality not in PREDICTED:
            raise ValueError(f"{name}: its modality is none of {', '.join(PREDICTED)}.")
        if stream.values.ndim != 3 or stream.values.dtype == np.uint8:
            raise ValueError(
                f"{name}: values are {stream.values.dtype} of shape {stream.values.shape}. Give floats (K, S, P): "
                "token times, sources, samples per token, with NaN where a sample is missing."
            )
        num_times, num_sources, num_samples = stream.values.shape
        offset_s = np.zeros(num_sources) if stream.offset_s is None else stream.offset_s
        shapes = {
            "keys": ((len(stream.keys),), (num_sources,)),
            "start_s": (np.shape(stream.start_s), (num_times,)),
            "visible": (np.shape(stream.visible), (num_times, num_sources)),
            "asked": (np.shape(stream.asked), (num_times, num_sources)),
            "offset_s": (np.shape(offset_s), (num_sources,)),
        }
        for field, (found, expected) in shapes.items():
            if found != expected:
                raise ValueError(
                    f"{name}: {field} has shape {found}, expected {expected} by values {stream.values.shape}."
                )
        if num_samples > self.samples_per_token:
            raise ValueError(f"{name}: {num_samples} samples a token; this model reads {self.samples_per_token}.")
        if (modality != MODALITIES.index(stream.modality)).any():
            others = sorted({MODALITIES[index] for index in modality.tolist()})
            raise ValueError(f"{name}: its keys are of {', '.join(others)} in this model's unit table.")

    def _tokens(self, stream: Stream, first: int, rows: Tensor) -> dict[str, Array]:
        num_times, num_sources, num_samples = stream.values.shape
        own = rows[first : first + num_sources]
        values = np.full((num_times * num_sources, self.samples_per_token), np.nan, np.float32)
        values[:, :num_samples] = stream.values.reshape(-1, num_samples)
        mean, scale = (np.tile(self.units[name][own].numpy(), num_times) for name in ("mean", "scale"))
        standard = standardise(values, mean, scale)
        offset_s = np.zeros(num_sources) if stream.offset_s is None else stream.offset_s
        start_s = np.repeat(stream.start_s, num_sources) + np.tile(offset_s, num_times)
        return {
            "source": np.tile(np.arange(first, first + num_sources), num_times),
            "start_s": start_s.astype(np.float32),
            "middle_s": middle(start_s, num_samples * stream.sample_s),
            "sample_s": np.full(len(values), stream.sample_s, np.float32),
            "standard": standard,
            "labels": values if stream.modality in COUNTED else standard,
            "observed": ~np.isnan(standard),
            "visible": stream.visible.reshape(-1),
            "asked": stream.asked.reshape(-1),
        }

    def physical(self, predictions: Tensor, query_source: Tensor, keys: list[str]) -> Tensor:
        """Predictions, or a bound of their interval (1, Q, P), in the units of the recording.

        `keys` are the sources of all streams in order.
        """
        rows, device = self.rows(keys)[query_source.cpu()], predictions.device
        mean, scale, modality = (self.units[name][rows][..., None] for name in ("mean", "scale", "modality"))
        is_counted = torch.from_numpy(IS_COUNTED)[modality].to(device)
        return torch.where(is_counted, predictions, predictions * scale.to(device) + mean.to(device))

    def next_event(self, predictions: Tensor, inputs: dict[str, Tensor]) -> NextEvent:
        """What happens next and when, by the predictions (1, Q, P) of a window in which events were asked for.

        Types are those of the streams of events in order, times the bins of 20 ms that were asked for.
        """
        types = (inputs["source_modality"][0] == EVENTS).nonzero()[:, 0]
        bins = predictions[..., :EVENT_BINS]  # what a token of events has not is no answer
        return NextEvent.of(intensities(bins, inputs["query_source"], inputs["query_time_s"], types))


def standardise(values: Array, mean: Array, scale: Array) -> npt.NDArray[np.float32]:
    """Values (n, P) by the train split's mean and scale (n,), limited; NaN stays NaN.

    What has no scale is missing.
    """
    scale = np.where(has_scale(mean, scale), scale, np.nan)
    standard = (values - mean[:, None]) / scale[:, None]
    return np.clip(standard, -STANDARD_LIMIT, STANDARD_LIMIT).astype(np.float32)


def has_scale(mean: Array, scale: Array) -> npt.NDArray[np.bool_]:
    """Of which sources (S,) the train split has values that are not all zero; of the others a store says 0 and 1."""
    known: npt.NDArray[np.bool_] = (mean != 0) | (scale != 1)
    return known


def source_null(modality: Array, mean: Array, scale: Array) -> npt.NDArray[np.float32]:
    """What the model's null knows of each source (S,): mean count in a bin; of traces their mean above physical zero.

    The latter in standard deviations, at least a little: where the mean is negative, physical zero means nothing.
    """
    height = np.maximum(mean / scale, np.float32(MIN_HEIGHT))
    return np.where(IS_COUNTED[modality], mean, np.where(modality == TRACES, height, 1)).astype(np.float32)


def middle(start_s: Array, duration_s: Array | float) -> npt.NDArray[np.float32]:
    """Middle of each token (n,): where it stands on the rotary clock."""
    return (start_s + np.asarray(duration_s) / 2).astype(np.float32)


def standard_pixels(frames: Array) -> npt.NDArray[np.float32]:
    """Grey frames (F, H, W) around zero with a spread of about one."""
    return ((frames.astype(np.float32) - PIXEL_MEAN) / PIXEL_SCALE).astype(np.float32)


BrainloomProcessor.register_for_auto_class("AutoFeatureExtractor")
